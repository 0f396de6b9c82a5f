//! Trees that are restored in namespaces that exist already (`--join-ns`), and what a dump says of a
//! network namespace. All of it needs root.

mod common;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    require,
};

/// A process in namespaces of its own, and what it was started with.
struct Holder(Child);

impl Holder {
    fn new(flags: &[&str], script: &str, dir: &Path) -> Self {
        let ready = dir.join("holder");
        let script = format!("{script}\n: >{}\nexec sleep 1000", ready.display());
        let mut command = Command::new("unshare");
        command.args(flags).args(["sh", "-ec", &script]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        wait_for("the namespaces", || ready.exists());
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn namespace(pid: i32, kind: &str) -> String {
    let path = format!("/proc/{pid}/ns/{kind}");
    fs::read_link(path).unwrap().into_os_string().into_string().unwrap()
}

/// Each kind, by a process and by a file; the other namespaces stay those of the machine.
#[test]
fn privileged_a_tree_joins_namespaces() {
    require(Cap::Ptrace);
    require(Cap::Program("unshare"));
    let kinds = ["net", "uts", "ipc", "time", "mnt"];
    let flags = ["-n", "-u", "-i", "-T", "-m"];
    for (kind, flag) in kinds.into_iter().zip(flags) {
        let mut live = Live::workload("tree");
        let holder = Holder::new(&[flag], "", live.dir.path());
        live.dump(&[]);
        let target = match kind {
            "net" | "mnt" => format!("{kind}:{}", holder.pid()),
            _ => format!("{kind}:/proc/{}/ns/{kind}", holder.pid()),
        };
        live.restore(&["--join-ns", &target]);
        for pid in live.tree() {
            for one in kinds {
                let wanted =
                    if one == kind { holder.pid() } else { std::process::id().cast_signed() };
                assert_eq!(namespace(pid, one), namespace(wanted, one), "{kind}: {one}");
            }
        }
        live.verdict();
        live.wait_gone();
    }
}

/// Memory that processes share by System V segments is made in the namespace that they join; and sockets are.
#[test]
fn privileged_objects_are_made_in_the_namespaces_that_are_joined() {
    require(Cap::Ptrace);
    require(Cap::Program("unshare"));
    for (state, flag, kind) in [
        ("ipc_namespace_segments", "-i", "ipc"),
        ("sysv_shm", "-i", "ipc"),
        ("uts_namespace", "-u", "uts"),
    ] {
        let mut live = Live::workload(state);
        let script = if kind == "uts" { "hostname rcriu-joined" } else { "" };
        let holder = Holder::new(&[flag], script, live.dir.path());
        live.dump(&[]);
        live.restore(&["--join-ns", &format!("{kind}:{}", holder.pid())]);
        assert_eq!(namespace(live.root.as_raw(), kind), namespace(holder.pid(), kind));
        if kind == "ipc" {
            live.verdict();
            live.wait_gone();
        }
    }
}

/// What cannot be kept is named; what is less, too.
#[test]
fn privileged_state_of_a_network_that_is_not_kept_is_named() {
    require(Cap::Ptrace);
    require(Cap::Program("ip"));
    let refused = [
        ("ip xfrm policy add src 10.0.0.0/8 dst 10.0.0.0/8 dir out", "1 policies (ip xfrm policy)"),
        ("ip nexthop add id 5 dev lo", "1 objects of next hops"),
        ("ipset create rcriu-addresses hash:ip", "the ipset rcriu-addresses"),
    ];
    for (line, words) in refused {
        let dir = directory();
        let script = format!(
            "ip link set lo up; {line} || echo lacks >{}",
            dir.path().join("lacks").display()
        );
        let holder = Holder::new(&["-n", "-f", "--kill-child"], &script, dir.path());
        if dir.path().join("lacks").exists() {
            eprintln!("not here: {line}");
            continue;
        }
        let mut live = Live::adopt(child_of(holder.pid()), dir);
        let output = live.try_dump(&["-R", "--shell-job"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(words), "{said}");
    }
    let dir = directory();
    let script = "ip link add v0 type veth peer name v1\n\
                  tc qdisc add dev v0 root tbf rate 1mbit burst 10kb latency 50ms";
    let holder = Holder::new(&["-n", "-f", "--kill-child"], script, dir.path());
    let mut live = Live::adopt(child_of(holder.pid()), dir);
    let output = live.try_dump(&["-R", "--shell-job"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("the traffic control of the network device v0 (tbf) is not kept"),
        "{said}"
    );
}

fn child_of(pid: i32) -> i32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap()
}
