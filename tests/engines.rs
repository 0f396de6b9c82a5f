//! containerd and Docker, whose runc calls rcriu as it calls criu.
//!
//! Each test has a daemon of its own, in namespaces for its mounts, network and processes: nothing of it is
//! left when it ends. The images are made of busybox. The tests take long, and need root.

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use common::{Cap, busybox::root_file_system, live::directory, live::engine, require, slow};

/// What both scripts begin with. `$1` is a directory, `$2` the name of the cgroup of the test.
const COMMON: &str = r#"
set -euo pipefail
cd "$1"
D=$1 PATH=$1/bin:$PATH
mount -t tmpfs tmpfs /run
ip link set lo up
daemon=
finish() {
    status=$?
    [ $status = 0 ] || grep -v level=info "$D"/*.log || true
    end
    kill $daemon
    wait $daemon || true
}
trap finish EXIT
wait_for() { # COMMAND...
    local i
    for i in $(seq 300); do
        if "$@"; then return; fi
        sleep 0.1
    done
    echo "waited in vain for: $*"
    exit 1
}
# Waits until a container has counted on, from where it has been.
reached=0
on() { # CONTAINER
    goes() { local n; n=$(count $1); [ "${n:-0}" -gt $((reached + 2)) ]; }
    wait_for goes $1
    reached=$(count $1)
}
COUNT='i=0; while true; do i=$((i+1)); echo $i; echo $i >/dev/shm/count; echo $i >/tmp/count; sleep 0.1; done'
"#;

/// Tasks that are dumped, and containers that are checkpointed into an image and restored from it.
const CONTAINERD: &str = r#"
N=$2
export CONTAINERD_ADDRESS=$D/socket CONTAINERD_NAMESPACE=$N
cat >containerd.toml <<END
version = 2
root = "$D/root"
state = "$D/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$D/socket"
[plugins."io.containerd.internal.v1.opt"]
  path = "$D/opt"
END
# A layer, its configuration and its manifest, each by its digest.
put() { local h; h=$(sha256sum <$1 | cut -d' ' -f1); cp $1 oci/blobs/sha256/$h; echo "\"digest\":\"sha256:$h\",\"size\":$(stat -c %s $1)"; }
mkdir -p oci/blobs/sha256
tar -C rootfs -cf layer .
layer=$(put layer)
printf '{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[%s]}}' "$(cut -d: -f2- <<<"${layer%%,*}")" >config
T=application/vnd.oci.image
printf '{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"%s",%s},"layers":[{"mediaType":"%s",%s}]}' \
    $T.manifest.v1+json $T.config.v1+json "$(put config)" $T.layer.v1.tar "$layer" >manifest
printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s",%s,"annotations":{"io.containerd.image.name":"local/busybox:1"}}]}' \
    $T.manifest.v1+json "$(put manifest)" >oci/index.json
printf '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout
tar -C oci -cf image .

remove() { # CONTAINER
    ctr task kill -s KILL $1 2>/dev/null || true
    gone() { ! ctr task ls | grep -q "^$1 .*RUNNING"; }
    wait_for gone $1
    ctr task rm $1 2>/dev/null || true
    ctr container rm $1
}
end() { for container in $(ctr container ls -q); do remove $container; done; }
executed=0
execute() { executed=$((executed + 1)); ctr task exec --exec-id e$executed-$RANDOM "$@"; }
count() { execute $1 cat /dev/shm/count 2>/dev/null; }

containerd -c containerd.toml >containerd.log 2>&1 & daemon=$!
answers() { ctr version >/dev/null 2>&1; }
wait_for answers
ctr image import --snapshotter native image >/dev/null
ctr run -d --null-io --snapshotter native local/busybox:1 one sh -c "$COUNT"
on one
ctr task checkpoint --image-path $D/images --work-path $D/work one
[ -e images/inventory.img ]
on one
ctr container checkpoint --rw --task one local/checkpoint:1
on one
remove one
for container in two three; do
    reached=2
    ctr container restore --rw --live $container local/checkpoint:1
    on $container
    [ $(execute $container cat /tmp/count) -ge $((reached - 1)) ]
done
ctr task checkpoint --exit --image-path $D/last three
gone() { ! ctr task ls | grep -q '^three .*RUNNING'; }
wait_for gone
[ -e last/inventory.img ]
"#;

/// Checkpoints that stop the container and that let it run on; a terminal; a volume.
const DOCKER: &str = r#"
export DOCKER_HOST=unix://$D/socket
end() { docker ps -aq | xargs -r docker rm -f >/dev/null; }
count() { docker logs $1 | tail -n 1 | tr -d '\r'; }
is() { [ "$(docker inspect -f '{{.State.Status}}' $1)" = $2 ]; }

dockerd --experimental --data-root $D/lib --exec-root $D/exec --pidfile $D/pid -H $DOCKER_HOST --cgroup-parent /$2 \
    --storage-driver vfs --bridge none --iptables=false >dockerd.log 2>&1 & daemon=$!
answers() { docker version >/dev/null 2>&1; }
wait_for answers
tar -C rootfs -c . | docker import - busybox:1 >/dev/null
# Docker keeps the images in a store of content, and gives up if what was there is not collected yet.
start() { # CHECKPOINT CONTAINER
    started() { docker start --checkpoint $1 $2 2>said || ! grep -q 'already exists' said; }
    wait_for started $1 $2
    is $2 running || { cat said; exit 1; }
}
mkdir volume
mount --bind volume volume
mount --make-shared volume
docker run -d --name one --network none -v $D/volume:/volume:rslave busybox:1 sh -c "$COUNT" >/dev/null
docker run -dt --name tty --network none busybox:1 sh -c "$COUNT" >/dev/null
for container in one tty; do
    reached=0
    on $container
    for checkpoint in c1 c2; do
        docker checkpoint create --leave-running $container of-$checkpoint >/dev/null
        on $container
        docker checkpoint create $container $checkpoint >/dev/null
        wait_for is $container exited
        start $checkpoint $container
        on $container
        [ $(docker exec $container cat /dev/shm/count) -ge $reached ]
    done
    [ "$(docker checkpoint ls $container | tail -n +2 | sort | xargs)" = "c1 c2 of-c1 of-c2" ]
done
"#;

/// Runs a script in namespaces of its own, and looks that nothing of it is left.
fn run(daemon: &'static str, script: &str) {
    slow();
    require(Cap::Ptrace);
    require(Cap::Program("runc"));
    require(Cap::Program("busybox"));
    require(Cap::Program(daemon));
    let dir = directory();
    fs::create_dir(dir.path().join("bin")).unwrap();
    symlink(engine(), dir.path().join("bin/criu")).unwrap();
    root_file_system(&dir.path().join("rootfs"));
    let group = format!("rcriu-{daemon}-{}", std::process::id());
    let output = Command::new("unshare")
        .args(["-m", "-n", "-p", "-f", "--kill-child", "--mount-proc"])
        .args(["bash", "-c", &format!("{COMMON}{script}"), "bash"])
        .arg(dir.path())
        .arg(&group)
        .output()
        .unwrap();
    // Daemons leave the cgroup above those of their containers.
    let left: Vec<PathBuf> =
        groups(&group).into_iter().filter(|group| fs::remove_dir(group).is_err()).collect();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    assert!(left.is_empty(), "{left:?}");
}

/// Returns the directories of a cgroup in all hierarchies.
fn groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top).unwrap().map(|entry| entry.unwrap().path());
    let all = std::iter::once(top.to_owned()).chain(hierarchies);
    all.map(|hierarchy| hierarchy.join(name)).filter(|group| group.is_dir()).collect()
}

#[test]
fn privileged_containerd_checkpoints_and_restores() {
    run("containerd", CONTAINERD);
}

#[test]
fn privileged_docker_checkpoints_and_starts_from_checkpoints() {
    require(Cap::Program("docker"));
    run("dockerd", DOCKER);
}
