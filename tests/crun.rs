//! crun with Debian 13's libcriu, unchanged: it executes `criu` of the search path.
//!
//! crun wants cgroups of version 2 alone, so it runs in a mount namespace of its own, in a root of Debian 13
//! that `tests/debian13` has made. The test takes long, and needs root.

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use common::{
    Cap,
    live::{directory, engine},
    require, slow, trixie,
};

/// Makes Debian's root that of the mount namespace, in which the file system of the script is a tmpfs.
const ENTER: &str = r#"
set -eu
mount --make-rprivate /
mount --bind "$1" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
for dir in run tmp mnt; do mount -t tmpfs tmpfs $dir; done
mkdir -p mnt/bin mnt/old
for dir in bin tmp proc dev sys; do mkdir -p mnt/bundle/rootfs/$dir; done
cp "$3" mnt/bin/rcriu
ln -s rcriu mnt/bin/criu
cp /bin/busybox mnt/bundle/rootfs/bin/
for command in sh sleep; do ln -s busybox mnt/bundle/rootfs/bin/$command; done
cp "$2/script" mnt/script
pivot_root . mnt/old
umount -l /mnt/old
exec bash /mnt/script "$4"
"#;

/// Counts five times a second, in a file.
const SCRIPT: &str = r##"
set -eu
export PATH=/mnt/bin:/usr/sbin:/usr/bin:/sbin:/bin
id=$1
trap 'crun delete -f $id >/dev/null 2>&1 || true' EXIT
cd /mnt/bundle
crun spec
sed -i 's/"terminal": true/"terminal": false/; s/"readonly": true/"readonly": false/' config.json
sed -i 's#"sh"#"/bin/sh", "-c", "i=0; while true; do i=$((i+1)); echo $i >/tmp/count; sleep 0.2; done"#' config.json
reached() { cat rootfs/tmp/count; }
on() {
    local from i
    from=$(reached)
    for i in $(seq 100); do
        [ "$(reached)" -gt "${from:-0}" ] && return
        sleep 0.1
    done
    echo "the container does not count on from $from"
    exit 1
}
both() { # checkpoint|restore DIRECTORY OPTION...
    local what=$1 dir=$2
    shift 2
    mkdir -p "/mnt/$dir" /mnt/work
    local detach=
    [ $what = checkpoint ] || detach=-d
    # What a container inherits must have a name inside.
    crun $what $detach --image-path "/mnt/$dir" --work-path /mnt/work "$@" $id </dev/null >/dev/null 2>&1 || {
        echo "crun $what $*"
        cat /mnt/work/*.log
        exit 1
    }
}
crun run -d $id </dev/null >/dev/null 2>&1
sleep 0.5
both checkpoint running --leave-running
on
both checkpoint 1
both restore 1
on
# What CRIU cannot do on kernels without soft-dirty bits.
both checkpoint p1 --pre-dump
both checkpoint p2 --pre-dump --parent-path ../p1
both checkpoint p3 --parent-path ../p2
[ "$(readlink /mnt/p3/parent)" = ../p2 ]
both restore p3
on
for mode in ignore soft full strict; do
    both checkpoint $mode --manage-cgroups-mode $mode
    both restore $mode --manage-cgroups-mode $mode
    on
done
both checkpoint l --file-locks --tcp-established --ext-unix-sk
both restore l --file-locks --tcp-established --ext-unix-sk
on
"##;

#[test]
fn privileged_crun_with_libcriu_of_debian_checkpoints_and_restores() {
    slow();
    require(Cap::Ptrace);
    require(Cap::Program("busybox"));
    let root = trixie::with("usr/bin/crun");
    let dir = directory();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("script"), SCRIPT).unwrap();
    let id = format!("rcriu-crun-{}", std::process::id());
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", ENTER, "bash"])
        .arg(root)
        .arg(dir.path())
        .arg(engine())
        .arg(&id)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    for place in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        assert!(!Path::new(place).join(&id).exists(), "{place}/{id} is left");
    }
}
