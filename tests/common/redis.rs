//! A client of redis.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use super::{
    live::{Live, directory, wait_for},
    net::{connect, port},
};

/// Sends a command to redis and returns its answer: a line, or a string.
pub fn redis(stream: &mut BufReader<TcpStream>, words: &[&str]) -> String {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.get_mut().write_all(text.as_bytes()).unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let Some(length) = line.strip_prefix('$') else {
        return line.trim_start_matches('+').trim_end().to_owned();
    };
    let Ok(length) = length.trim_end().parse::<usize>() else { return "(nil)".to_owned() };
    let mut data = vec![0; length + 2];
    stream.read_exact(&mut data).unwrap();
    data.truncate(length);
    String::from_utf8(data).unwrap()
}

/// A redis server with this many keys of 1000 bytes, and its port.
pub fn populated(keys: usize) -> (Live, u16) {
    let (dir, port) = (directory(), port());
    let (place, number) = (dir.path().to_str().unwrap().to_owned(), port.to_string());
    let arguments = ["--port", &number, "--bind", "127.0.0.1", "--dir", &place, "--save", ""];
    let arguments = [&arguments[..], &["--enable-debug-command", "yes"]].concat();
    let live = Live::program("redis-server", &arguments, dir);
    let mut client = BufReader::new(connect(port));
    let populate = ["DEBUG", "POPULATE", &keys.to_string(), "key", "1000"];
    assert_eq!(redis(&mut client, &populate), "OK");
    drop(client);
    wait_idle(&live);
    (live, port)
}

/// Returns a hash of all that redis holds.
pub fn digest(port: u16) -> String {
    redis(&mut BufReader::new(connect(port)), &["DEBUG", "DIGEST"])
}

/// Waits until the server has seen the end of its clients.
pub fn wait_idle(live: &Live) {
    wait_for("the server to be idle", || open_sockets(live.root.as_raw()) == 1);
}

/// Returns how many sockets a process has open.
pub fn open_sockets(pid: i32) -> usize {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    links
        .filter_map(|link| fs::read_link(link.path()).ok())
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}
