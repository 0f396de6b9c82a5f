//! Podman, whose runc calls rcriu as it calls criu.
//!
//! The root file system of its containers is that of busybox. A container counts, and counts on after a
//! restore. All tests take long, and need root.

mod common;

use std::{fs, os::unix::fs::symlink, process::Command};

use common::{
    Cap,
    busybox::root_file_system,
    live::{directory, engine},
    require, slow,
};

/// Executes commands of the shell with a Podman of its own as `$P`, which finds `criu` in the search
/// path, and with an image `rcriu-test:1`. Standard output is that of the commands.
fn podman(commands: &str) -> String {
    podman_in(&["bash"], commands)
}

/// The same; `shell` begins the command line that executes the commands.
fn podman_in(shell: &[&str], commands: &str) -> String {
    slow();
    for program in ["runc", "busybox", "podman"] {
        require(Cap::Program(program));
    }
    require(Cap::Ptrace);
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("bin")).unwrap();
    symlink(engine(), path("bin/criu")).unwrap();
    root_file_system(&path("rootfs"));
    const CONFIGURATION: &str = "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=1024:1024\"]\n\
                                 [engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\nruntime=\"runc\"\n";
    fs::write(path("containers.conf"), CONFIGURATION).unwrap();
    let script = format!(
        "set -eu
         cd {dir}
         export PATH={dir}/bin:$PATH CONTAINERS_CONF={dir}/containers.conf
         P='podman --root {dir}/root --runroot {dir}/run --storage-driver vfs'
         trap '$P rm -af -t 0 >/dev/null; $P rmi -af >/dev/null' EXIT
         tar -C rootfs -c . | $P import - rcriu-test:1 >/dev/null
         {commands}",
        dir = dir.path().display(),
    );
    let mut command = Command::new(shell[0]);
    let output = command.args(&shell[1..]).args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn privileged_podman_checkpoints_exports_and_imports() {
    podman(
        r#"reached() { $P logs $1 | tail -1; }
         on() { until n=$(reached $1); [ -n "$n" ]; do sleep 0.1; done; sleep 1; test $(reached $1) -gt $n; test $n -ge $2; }
         $P run -d --name one --network none rcriu-test:1 sh -c \
             'i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done' >/dev/null
         on one 0
         $P container checkpoint one; $P container restore one; on one 5
         for how in zstd gzip none; do
             n=$(reached one)
             $P container checkpoint --compress $how -e archive one; $P rm one >/dev/null
             $P container restore -i archive -n one; on one 0
         done
         $P container checkpoint -P -e before one
         $P container checkpoint --with-previous -e last one; $P rm one >/dev/null
         $P container restore --import-previous before -i last -n one; on one 0"#,
    );
}

/// A configuration file of runc makes each full checkpoint that Podman asks for incremental, and the last one
/// is restored. The process with the memory forks no more: a child would have all of it, too.
#[test]
fn privileged_checkpoints_of_podman_in_a_chain_cost_what_has_changed() {
    let told = podman(
        r#"reached() { $P logs $1 | tail -1; }
         on() { until n=$(reached $1); [ -n "$n" ]; do sleep 0.1; done; sleep 1; test $(reached $1) -gt $n; test $n -ge $2; }
         echo "chain $PWD/chain" >runc.conf
         $P run -d --name one --network none --annotation org.criu.config=$PWD/runc.conf rcriu-test:1 sh -c \
             "mkfifo /tmp/idle; (large=\$(head -c 20000000 /dev/zero | tr '\\0' x); exec 9<>/tmp/idle; : >/tmp/filled; read line <&9) & \
              until [ -e /tmp/filled ]; do sleep 0.1; done; i=0; while true; do i=\$((i+1)); echo \$i; sleep 0.2; done" >/dev/null
         on one 0
         for number in 1 2 3 4 5; do
             $P container checkpoint -R one >/dev/null
             on one 1
             echo $(cat chain/$number/pages-*.img | wc -c) $(readlink chain/$number/parent || echo none)
         done
         n=$(reached one)
         $P kill one >/dev/null
         $P wait one >/dev/null
         $P container restore one >/dev/null
         back() { for i in $(seq 100); do [ $(reached one) -ge $n ] || return 0; sleep 0.1; done; false; }
         back
         on one 5"#,
    );
    let mut stored = told.lines().map(|line| line.split_once(' ').unwrap());
    let mut next = || stored.next().map(|(pages, parent)| (pages.parse::<u64>().unwrap(), parent));
    let (first, parent) = next().unwrap();
    assert!(first > 20_000_000 && parent == "none", "{told}");
    for number in 1..5 {
        let (pages, parent) = next().unwrap();
        assert!(pages < first / 20 && parent == format!("../{number}"), "{told}");
    }
}

/// A client that is connected to a published port stays so: the bridge, the addresses and the rules of
/// the host belong to Podman, the rest to rcriu. The host is a network namespace of its own here.
#[test]
fn privileged_clients_of_published_ports_of_podman_stay_connected() {
    require(Cap::Program("python3"));
    let client = "import os, socket, sys, time\n\
                  s = socket.create_connection(('127.0.0.1', 8099), 20)\n\
                  s.sendall(b'before'); print(s.recv(9)); open('connected', 'w').close()\n\
                  while not os.path.exists('restored'): time.sleep(.1)\n\
                  s.settimeout(60); s.sendall(b'after'); print(s.recv(9))";
    let told = podman_in(
        &["unshare", "-n", "-m", "bash"],
        &format!(
            r#"ip link set lo up
             cat >client.py <<'END'
{client}
END
             $P run -d --name one -p 8099:7711 rcriu-test:1 nc -ll -p 7711 -e cat >/dev/null
             until $P exec one ps | grep -q "nc -ll"; do sleep 0.1; done
             python3 client.py & client=$!
             until [ -e connected ]; do kill -0 $client; sleep 0.1; done
             seen() {{ $P exec one ip addr show eth0 | grep -E "link|inet "; }}
             before=$(seen)
             $P container checkpoint --tcp-established one >/dev/null
             $P container restore --tcp-established one >/dev/null
             touch restored
             wait $client
             [ "$before" = "$(seen)" ]"#
        ),
    );
    assert_eq!(told, "b'before'\nb'after'\n");
}

/// Several containers of one checkpoint, with a volume; a terminal.
#[test]
fn privileged_podman_clones_checkpoints_and_keeps_volumes_and_terminals() {
    podman(
        r#"reached() { $P logs $1 | tail -1 | tr -d '\r'; }
         on() { until n=$(reached $1); [ -n "$n" ]; do sleep 0.1; done; sleep 1; test $(reached $1) -gt $n; test $n -ge $2; }
         count='i=0; while true; do i=$((i+1)); echo $i; echo $i >/data/n; sleep 0.2; done'
         mkdir bound
         $P run -d --name one --network none -v $PWD/bound:/data rcriu-test:1 sh -c "$count" >/dev/null
         on one 0
         $P container checkpoint one; $P container restore one; on one 5
         n=$(cat bound/n); sleep 1; test $(cat bound/n) -gt $n
         $P container checkpoint -e archive one; $P rm one >/dev/null
         for name in two three; do $P container restore -i archive -n $name; on $name 5; done
         $P container checkpoint --create-image rcriu-checkpoint:1 two >/dev/null
         for name in four five; do $P container restore -n $name rcriu-checkpoint:1; on $name 5; done
         count='i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done'
         $P run -dt --name tty --network none rcriu-test:1 sh -c "$count" >/dev/null
         on tty 0
         $P container checkpoint -R tty; on tty 5
         $P container checkpoint tty; $P container restore tty; on tty 5"#,
    );
}

/// Debian has checkpointctl since version 13.
#[test]
fn privileged_checkpointctl_reads_archives_of_podman_and_imgfs() {
    require(Cap::Program("checkpointctl"));
    let told = podman(&format!(
        r#"I={imgfs}
         $P run -d --name one --network none -e MARK=of-the-test rcriu-test:1 sh -c \
             'exec 7>/tmp/opened; nc -l -p 4444 >/dev/null & while true; do sleep 1000; done' >/dev/null
         runs() {{ $P exec one ps | grep -q "$1$"; }}
         until runs 'nc -l -p 4444' && runs 'sleep 1000'; do sleep 0.1; done
         $P container checkpoint --leave-running --compress none -e plain.tar one >/dev/null
         $P container checkpoint -P -e before.tar one >/dev/null
         $P container checkpoint --with-previous -e last.tar one >/dev/null
         $I pack plain.tar packed.tar.zst
         $I flatten last.tar --previous before.tar --archive flat.tar
         for archive in plain.tar packed.tar.zst flat.tar; do
             echo "=== $archive"
             checkpointctl show $archive
             checkpointctl inspect --all $archive
             checkpointctl memparse $archive
             checkpointctl memparse -p 1 -s of-the-test $archive
         done"#,
        imgfs = env!("CARGO_BIN_EXE_imgfs"),
    ));
    let archives: Vec<&str> = told.split("=== ").skip(1).collect();
    assert_eq!(archives.len(), 3);
    for archive in archives {
        for expected in [
            "localhost/rcriu-test:1",
            "Podman",
            "Pages written: ",
            "sh -c exec 7>/tmp/opened; nc -l -p 4444 >/dev/null & while",
            "MARK=of-the-test",
            "[REG 7]  /tmp/opened",
            "nc -l -p 4444",
            "[TCP (LISTEN)]  :::4444",
            "PROCESS NAME",
            "   of-the-test   1",
        ] {
            assert!(archive.contains(expected), "{expected}: {archive}");
        }
    }
}
