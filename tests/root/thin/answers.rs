//! A pool in trouble as containerd and `speedy check` see it: the code and the words of an answer, and that the way out that is told
//! leads out.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use speedy::driver::thin::{Devices, PoolOptions};
use speedy::proto::containerd::services::snapshots::v1 as wire;
use speedy::snapshot::metastore;
use tonic::{Code, Status};

use super::disks::{DATA, Disks, METADATA};
use super::{MIB, Mounted, Served, clear, mount_of, require_content, sh, started, work};
use crate::process::{Client, Daemon, Place, commit, prepare, runtime};

/// A daemon on devices that can be made to fail; what it made of them goes first.
struct Faulty {
    served: Served,
    disks: Disks,
}

impl Faulty {
    fn new(tag: &str, metadata_mib: u64, data_mib: u64, reserve: u8) -> Faulty {
        let disks = Disks::new(tag, metadata_mib, data_mib);
        let devices = Devices::Direct { data: disks.device(DATA), metadata: disks.device(METADATA) };
        Faulty { served: Served { place: Place::new(), pool: PoolOptions { devices, reserve } }, disks }
    }

    /// Starts that are refused: what is said.
    fn refused(&self) -> String {
        let output = self.served.command(None).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What `speedy check` finds of the pool: how it came out, and what to do.
    fn check(&self) -> (String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
        command.env_clear().args(["check", "--json", "--root"]).arg(self.served.place.root());
        let report: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        let findings = report["findings"].as_array().unwrap();
        let found = findings.iter().find(|finding| finding["title"] == "pool of thin volumes").unwrap();
        println!("check: {} {} {}", found["status"], found["detail"], found["fix"]);
        let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
        (text("status"), text("fix"))
    }

    fn require_fine(&self) {
        assert_eq!(self.check(), ("ok".into(), String::new()));
    }

    /// Everything of this pool is taken away, as an administrator does it whom `speedy check` told so.
    fn stop(&self, daemon: &mut Daemon) {
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        clear(&self.served.tag());
    }
}

fn told(status: &Status, code: Code, words: &str) {
    println!("{:?}: {}", status.code(), status.message());
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(words), "{status:?}");
}

async fn remove(client: &mut Client, key: &str) {
    client.remove(wire::RemoveSnapshotRequest { key: key.into(), ..Default::default() }).await.unwrap();
}

async fn cleanup(client: &mut Client) {
    client.cleanup(wire::CleanupRequest::default()).await.unwrap();
}

/// A container that writes so much; whether there was room.
async fn write(client: &mut Client, key: &str, mib: u64) -> bool {
    let answer = client.prepare(prepare(key, "", &[])).await.unwrap().into_inner();
    let mounted = Mounted::new(&mount_of(answer.mounts));
    let file = mounted.path("large");
    let wrote = fs::write(&file, vec![1; usize::try_from(mib * MIB).unwrap()])
        .and_then(|()| fs::File::open(&file)?.sync_all());
    wrote.is_ok()
}

#[test]
#[ignore = "needs device-mapper"]
fn a_data_device_without_room_is_resource_exhausted() {
    let mut faulty = Faulty::new("nodata", 8, 96, 50);
    runtime().block_on(async {
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        work(&mut client, "one").await.unwrap();
        assert!(write(&mut client, "first", 50).await);
        let refused = client.prepare(prepare("more", "one", &[])).await.unwrap_err();
        told(&refused, Code::ResourceExhausted, "pool.reserve keeps 50 %");
        faulty.require_fine();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());

        faulty.served.pool.reserve = 0;
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        assert!(!write(&mut client, "second", 50).await, "96 MiB are not enough for both");
        let refused = client.prepare(prepare("more", "one", &[])).await.unwrap_err();
        told(&refused, Code::ResourceExhausted, "data device is full");
        let (status, fix) = faulty.check();
        assert!(status == "failure" && fix.contains("remove images"), "{status} {fix}");
        // As it says.
        remove(&mut client, "first").await;
        remove(&mut client, "second").await;
        cleanup(&mut client).await;
        faulty.require_fine();
        client.prepare(prepare("more", "one", &[])).await.unwrap();
        remove(&mut client, "more").await;
        // Or so: it goes on without a restart.
        assert!(write(&mut client, "first", 50).await && !write(&mut client, "second", 50).await);
        faulty.disks.grow(DATA, 256);
        cleanup(&mut client).await;
        faulty.require_fine();
        require_content(&mut client, "one").await;
        for key in ["first", "second"] {
            remove(&mut client, key).await;
        }
        cleanup(&mut client).await;
        faulty.stop(&mut daemon);
        faulty.served.require_equal("without room");
    });
    faulty.served.thin_check("without room");
}

/// Makes snapshots, each with a block of its own in every leaf of its map, until one is refused.
async fn eat(client: &mut Client, name: &str) -> (Vec<String>, Status) {
    let mut made = Vec::new();
    loop {
        let key = format!("{name}{}", made.len());
        let mounts = match client.prepare(prepare(&key, "eaten", &[])).await {
            Ok(answer) => answer.into_inner().mounts,
            Err(refused) => return (made, refused),
        };
        made.push(key);
        assert!(made.len() < 60, "never full");
        let device = fs::File::options().write(true).open(mount_of(mounts).source).unwrap();
        // Where an error is the end that is looked for.
        let wrote = (64..512).step_by(8).try_for_each(|mib| device.write_all_at(&[2; 4096], mib * MIB));
        println!("{name}{}: {:?}", made.len(), wrote.and_then(|()| device.sync_all()).err());
    }
}

/// Below the reserve no snapshot is made, but those that are there can be written to until nothing is left. The kernel then calls the
/// pool read-only, for good, and will not even remove a volume.
#[test]
#[ignore = "needs device-mapper"]
fn metadata_that_is_full_to_the_last_block_is_given_more() {
    let mut faulty = Faulty::new("nometa", 2, 1024, 0);
    runtime().block_on(async {
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        work(&mut client, "one").await.unwrap();
        let large = [("containerd.io/snapshot/max-size", "536870912")];
        let mounts = client.prepare(prepare("eaten-active", "", &large)).await.unwrap().into_inner().mounts;
        let device = fs::File::options().write(true).open(mount_of(mounts).source).unwrap();
        for block in (64 * MIB..512 * MIB).step_by(128 << 10) {
            device.write_all_at(&[1; 4096], block).unwrap();
        }
        device.sync_all().unwrap();
        drop(device);
        client.commit(commit("eaten", "eaten-active")).await.unwrap();

        let (mut made, refused) = eat(&mut client, "a").await;
        told(&refused, Code::ResourceExhausted, "full to its last block");
        let again = client.prepare(prepare("more", "one", &[])).await.unwrap_err();
        told(&again, Code::ResourceExhausted, "full to its last block");
        let (status, fix) = faulty.check();
        assert!(status == "failure" && fix.contains("lvextend") && fix.contains("dd if="), "{status} {fix}");
        // The first way: more room below a daemon that runs.
        faulty.disks.grow(METADATA, 3);
        cleanup(&mut client).await;
        faulty.require_fine();
        require_content(&mut client, "one").await;

        let (more, refused) = eat(&mut client, "b").await;
        told(&refused, Code::ResourceExhausted, "full to its last block");
        made.extend(more);
        // The second way, with another device.
        faulty.stop(&mut daemon);
        let said = faulty.refused();
        assert!(said.contains("full to its last block") && said.contains("dd if="), "{said}");
        clear(&faulty.served.tag());
        let larger = Larger::new(&faulty.served.place.path("larger"));
        sh(&format!(
            "dd if={} of={} bs=1M conv=fsync 2>/dev/null",
            faulty.disks.device(METADATA).display(),
            larger.0.display()
        ));
        faulty.served.pool.devices =
            Devices::Direct { data: faulty.disks.device(DATA), metadata: larger.0.clone() };
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        faulty.require_fine();
        require_content(&mut client, "one").await;
        client.prepare(prepare("more", "one", &[])).await.unwrap();
        made.push("more".into());
        for key in &made {
            remove(&mut client, key).await;
        }
        require_content(&mut client, "one").await;
        cleanup(&mut client).await;
        faulty.stop(&mut daemon);
        faulty.served.require_equal("full metadata");
        faulty.served.thin_check("full metadata");
    });
}

/// A loop device of 8 MiB.
struct Larger(PathBuf);

impl Larger {
    fn new(path: &Path) -> Larger {
        fs::File::create(path).unwrap().set_len(8 * MIB).unwrap();
        Larger(PathBuf::from(sh(&format!("losetup -f; losetup $(losetup -f) {}", path.display())).trim()))
    }
}

impl Drop for Larger {
    fn drop(&mut self) {
        // The pool on it goes with the daemon's place.
        sh(&format!("losetup -d {} || true", self.0.display()));
    }
}

/// With the metadata the pool itself has failed. Without data it goes on where it can, and each request that cannot says so.
#[test]
#[ignore = "needs device-mapper"]
fn a_device_that_fails_is_an_error_with_the_way_out() {
    for (device, writes_only, words) in [
        (METADATA, false, "the pool has failed"),
        (METADATA, true, "to be checked (needs_check)"),
        (DATA, false, "Input/output error"),
    ] {
        let faulty = Faulty::new("eio", 8, 256, 10);
        runtime().block_on(async {
            let (mut daemon, mut client) = started(&faulty.served, None).await;
            work(&mut client, "one").await.unwrap();
            let answer = client.prepare(prepare("two", "one", &[])).await.unwrap().into_inner();
            let mounted = Mounted::new(&mount_of(answer.mounts));
            fs::write(mounted.path("more"), "more").unwrap();
            match writes_only {
                true => faulty.disks.fail_writes(device),
                false => faulty.disks.fail(device, true),
            }
            let synced = fs::File::open(mounted.path("more")).unwrap().sync_all();
            assert!(synced.is_err(), "{device}: whoever writes is told as well");
            let refused = client.prepare(prepare("three", "one", &[])).await.unwrap_err();
            told(&refused, Code::Internal, words);
            let again = client.prepare(prepare("three", "one", &[])).await.unwrap_err();
            told(&again, Code::Internal, words);
            if device == METADATA {
                let (status, fix) = faulty.check();
                let told =
                    fix.contains("dmsetup remove") && fix.contains("thin_check --clear-needs-check-flag");
                assert!(status == "failure" && told && fix.contains(words), "{status} {fix}");
            }
            sh(&format!("umount {}", mounted.path("").display()));
            std::mem::forget(mounted);

            // As it says.
            faulty.disks.fail(device, false);
            faulty.stop(&mut daemon);
            let metadata = faulty.disks.device(METADATA);
            sh(&format!("pdata_tools thin_check --clear-needs-check-flag {}", metadata.display()));
            let (mut daemon, mut client) = started(&faulty.served, None).await;
            faulty.require_fine();
            require_content(&mut client, "one").await;
            client.prepare(prepare("three", "one", &[])).await.unwrap();
            remove(&mut client, "two").await;
            remove(&mut client, "three").await;
            cleanup(&mut client).await;
            faulty.stop(&mut daemon);
            faulty.served.require_equal(device);
        });
        faulty.served.thin_check(device);
    }
}

/// Without its pool the daemon does not start: it would answer that everything is lost.
#[test]
#[ignore = "needs device-mapper"]
fn a_pool_that_is_gone_or_anothers_is_named_at_the_start() {
    let mut faulty = Faulty::new("gone", 8, 256, 10);
    runtime().block_on(async {
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        work(&mut client, "one").await.unwrap();
        faulty.stop(&mut daemon);
        let (status, fix) = faulty.check();
        assert!(status == "warning" && fix.contains("says why it cannot"), "{status} {fix}");

        let devices = faulty.served.pool.devices.clone();
        faulty.served.pool.devices =
            Devices::Direct { data: "/dev/not-there".into(), metadata: faulty.disks.device(METADATA) };
        let said = faulty.refused();
        assert!(said.contains("/dev/not-there is not there"), "{said}");
        faulty.served.pool.devices = devices;
        let held = fs::OpenOptions::new();
        let held = {
            use std::os::unix::fs::OpenOptionsExt;
            held.clone().read(true).custom_flags(0o200).open(faulty.disks.device(DATA)).unwrap()
        };
        let said = faulty.refused();
        assert!(said.contains("in use by another program"), "{said}");
        drop(held);
        // The same pool, and records that know nothing of it.
        let place = std::mem::replace(&mut faulty.served.place, Place::new());
        let said = faulty.refused();
        clear(&faulty.served.tag());
        assert!(said.contains("another program uses it, or metadata.db is lost"), "{said}");
        faulty.served.place = place;

        let (mut daemon, mut client) = started(&faulty.served, None).await;
        require_content(&mut client, "one").await;
        cleanup(&mut client).await;
        faulty.stop(&mut daemon);
        faulty.served.require_equal("there again");
    });
    faulty.served.thin_check("there again");
}

/// Another program made a thin device under the number that comes next. The call that met it was undone like any other that fails: its
/// number was freed, with what was there.
#[test]
#[ignore = "needs device-mapper"]
fn a_thin_device_that_is_there_already_is_left_alone() {
    let faulty = Faulty::new("taken", 8, 256, 10);
    runtime().block_on(async {
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        work(&mut client, "one").await.unwrap();
        let recorded = metastore::read_recorded(&faulty.served.place.root()).unwrap().unwrap();
        let next =
            recorded.ids.iter().filter(|id| recorded.pending.contains(&id.serial)).min_by_key(|id| id.serial);
        let (thin_id, pool) = (next.unwrap().slot + 16, format!("speedy-{}-pool", faulty.served.tag()));
        let make = format!("dmsetup message {pool} 0 'create_thin {thin_id}'");
        sh(&make);
        let refused = client.prepare(prepare("two", "one", &[])).await.unwrap_err();
        told(&refused, Code::Internal, "there already, and not ours");
        cleanup(&mut client).await;
        client.prepare(prepare("two", "one", &[])).await.unwrap();
        require_content(&mut client, "one").await;
        let is_there = || {
            let made = Command::new("sh").args(["-c", &make]).output().unwrap();
            assert!(!made.status.success(), "another program's device was deleted");
        };
        is_there();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        assert!(daemon.log().contains("a volume that no record names"), "{}", daemon.log());
        remove(&mut client, "two").await;
        cleanup(&mut client).await;
        is_there();
        // Gone, and its number is one of ours again.
        sh(&format!("dmsetup message {pool} 0 'delete {thin_id}'"));
        faulty.stop(&mut daemon);
        let (mut daemon, mut client) = started(&faulty.served, None).await;
        cleanup(&mut client).await;
        faulty.stop(&mut daemon);
        faulty.served.require_equal("taken");
    });
    faulty.served.thin_check("taken");
}
