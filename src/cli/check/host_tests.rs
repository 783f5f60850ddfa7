use super::super::Status;
use super::*;
use crate::sys::mount::ErofsIo;

fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn unreadable() -> Result<String, String> {
    Err("cannot read it".into())
}

const FILESYSTEMS: &str = "nodev\tsysfs\n\text4\nnodev\toverlay\n\terofs\nnodev\tfuse\n\tfuseblk\n";

#[test]
fn the_kernel_is_named() {
    assert_eq!(kernel(text("6.1.0-18-amd64\n")).detail, "Linux 6.1.0-18-amd64");
    assert_eq!(kernel(unreadable()).status, Status::Skipped);
}

#[test]
fn file_systems_are_found_by_their_whole_name() {
    assert!(listed(FILESYSTEMS, "overlay") && listed(FILESYSTEMS, "ext4"));
    assert!(!listed(FILESYSTEMS, "ext") && !listed(FILESYSTEMS, "nodev"));
}

#[test]
fn the_overlay_trial_decides() {
    let fine = overlay(&text(FILESYSTEMS), Some(Ok(vec!["index=off".into(), "volatile".into()])));
    assert_eq!(fine.status, Status::Ok);
    assert!(fine.detail.ends_with("every mount gets index=off,volatile"));
    assert!(overlay(&text(""), Some(Ok(vec![]))).detail.ends_with("no extra options"));
    let absent = overlay(&text("nodev\tproc\n"), Some(Err("no such device".into())));
    assert_eq!((absent.status, absent.detail.as_str()), (Status::Failure, "no such device"));
    assert!(absent.fix.unwrap().starts_with("modprobe overlay"));
    let refused = overlay(&text(FILESYSTEMS), Some(Err("put `root` elsewhere".into())));
    assert_eq!((refused.status, refused.fix), (Status::Failure, None));
    assert_eq!(overlay(&unreadable(), None).status, Status::Skipped);
}

#[test]
fn id_mapping_is_judged_by_its_trial() {
    assert_eq!(id_mapping(Some(Ok(true))).status, Status::Ok);
    assert_eq!(id_mapping(Some(Ok(false))).status, Status::Warning);
    let refused = id_mapping(Some(Err(io::Error::from_raw_os_error(22))));
    assert_eq!(refused.status, Status::Warning);
    assert!(refused.detail.contains("remap-ids"), "{}", refused.detail);
    assert_eq!(id_mapping(None).status, Status::Skipped);
}

#[test]
fn layers_are_judged_by_their_trials() {
    assert_eq!(layer_images(Some(Ok(Way::FileBacked(ErofsIo::Direct)))).detail, "file-backed EROFS");
    let on_loops = layer_images(Some(Ok(Way::Loop)));
    assert!(on_loops.status == Status::Ok && on_loops.detail.contains("6.12"), "{}", on_loops.detail);
    let refused = AttachError::Unsupported { file_backed: None, loop_device: None };
    assert_eq!(layer_images(Some(Err(refused))).status, Status::Warning);
    assert!(taking_over(Some(Ok(true))).detail.contains("asks again"));
    assert!(taking_over(Some(Ok(false))).detail.contains("journal"));
    assert_eq!(taking_over(Some(Err(io::Error::from_raw_os_error(2)))).status, Status::Warning);
    assert_eq!([layer_images(None).status, taking_over(None).status], [Status::Skipped; 2]);
}

#[test]
fn what_lazy_layers_need_is_only_information() {
    let all = lazy_kernel(&text(FILESYSTEMS), |_| true);
    assert_eq!((all.status, all.detail.as_str()), (Status::Ok, "all there"));
    let some = lazy_kernel(&text("nodev\tfuse\n"), |device| device == "/dev/fuse");
    assert_eq!(some.status, Status::Ok);
    assert!(some.detail.starts_with("not loaded: EROFS, loop devices;"), "{}", some.detail);
    assert_eq!(lazy_kernel(&unreadable(), |_| true).status, Status::Skipped);
    assert_eq!(fuse_timeout(None).detail, "this kernel has none");
    assert_eq!(fuse_timeout(Some("0\n")).detail, "none is set");
    assert!(fuse_timeout(Some("60\n")).detail.contains("after 60 s"));
    assert_eq!(fuse_timeout(Some("x")).status, Status::Skipped);
}

fn judged(kind: &str, options: &str) -> Finding {
    let table = mountinfo::parse(&format!("1 0 8:1 / /data {options} - {kind} /dev/sda1 rw"));
    let root = Path::new("/data/speedy");
    file_system(Ok(mountinfo::holding(&table, root)), root, None)
}

#[test]
fn file_systems_are_judged() {
    for kind in ["ext4", "xfs", "btrfs", "zfs"] {
        assert_eq!(judged(kind, "rw").status, Status::Ok, "{kind}");
        assert_eq!(judged(kind, "ro").status, Status::Failure, "{kind}");
    }
    assert_eq!(judged("overlay", "rw").status, Status::Failure);
    for kind in ["nfs", "nfs4", "9p", "tmpfs", "fuse.sshfs"] {
        let finding = judged(kind, "rw");
        assert_eq!(finding.status, Status::Warning, "{kind}");
        assert!(finding.fix.is_some());
    }
    let root = Path::new("/data/speedy");
    assert_eq!(file_system(Ok(None), root, None).status, Status::Skipped);
    assert_eq!(file_system(Err(&"no".into()), root, None).status, Status::Skipped);
}

#[test]
fn a_root_that_is_not_there_yet_is_said() {
    let table = mountinfo::parse("1 0 8:1 / / rw - ext4 /dev/sda1 rw");
    let finding = file_system(Ok(table.first()), Path::new("/var/lib"), Some(Path::new("/var/lib/speedy")));
    assert!(finding.detail.contains("/var/lib/speedy does not exist yet, so /var/lib was looked at"));
}

#[test]
fn little_room_is_a_warning() {
    let gib = 1 << 30;
    let plenty = Space { bytes: 100 * gib, bytes_free: 50 * gib, inodes: 1000, inodes_free: 500 };
    let judge = |space| room(Ok(space), Path::new("/data")).iter().map(|f| f.status).collect::<Vec<_>>();
    assert_eq!(judge(plenty), [Status::Ok, Status::Ok]);
    assert_eq!(judge(Space { bytes_free: 2 * gib, ..plenty }), [Status::Warning, Status::Ok]);
    assert_eq!(judge(Space { bytes: gib, bytes_free: gib / 2, ..plenty }), [Status::Warning, Status::Ok]);
    assert_eq!(judge(Space { inodes_free: 40, ..plenty }), [Status::Ok, Status::Warning]);
    // btrfs counts no inodes.
    assert_eq!(judge(Space { inodes: 0, inodes_free: 0, ..plenty }), [Status::Ok, Status::Ok]);
    assert_eq!(judge(Space::default()), [Status::Warning, Status::Ok]);
    let failed = room(Err(io::ErrorKind::PermissionDenied.into()), Path::new("/data"));
    assert!(failed.iter().all(|finding| finding.status == Status::Skipped));
}

#[test]
fn missing_capabilities_are_named_with_their_use() {
    let status =
        |user: u32, set: &str| text(&format!("Name:\tx\nUid:\t1000\t{user}\t0\t0\nCapEff:\t{set}\n"));
    let daemon = Whose::Daemon(7);
    let all = privileges(status(0, "000001ffffffffff"), daemon);
    assert_eq!(all.detail, "the daemon (pid 7) runs as user 0 with every capability it uses");
    let none = privileges(status(0, "0000000000000000"), daemon);
    assert_eq!(none.status, Status::Failure);
    assert!(none.fix.unwrap().contains(
        "CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_SYS_ADMIN"
    ));
    let one = privileges(status(0, "000001ffffdfffff"), Whose::Ours);
    assert_eq!(one.status, Status::Failure);
    assert_eq!(one.detail, "this command runs as user 0 without CAP_SYS_ADMIN (trial mounts)");
    let ordinary = privileges(status(1000, "0000000000000000"), Whose::Ours);
    assert_eq!((ordinary.status, ordinary.fix.as_deref()), (Status::Skipped, Some("sudo speedy check")));
    assert_eq!(privileges(status(1000, "0"), daemon).status, Status::Failure);
    assert_eq!(privileges(unreadable(), daemon).status, Status::Skipped);
    assert_eq!(privileges(text(""), daemon).status, Status::Failure);
}

#[test]
fn limits_of_open_files_are_read() {
    let limits = |soft: &str, hard: &str| {
        text(&format!(
            "Limit                     Soft Limit           Hard Limit           Units\n\
             Max processes             1                    2                    processes\n\
             Max open files            {soft}                 {hard}               files\n"
        ))
    };
    assert_eq!(open_files(limits("1024", "524288"), Whose::Ours).status, Status::Ok);
    assert_eq!(
        open_files(limits("1024", "unlimited"), Whose::Ours).detail,
        "this command may open 1024, and can raise that to no limit"
    );
    let few = open_files(limits("256", "1024"), Whose::Ours);
    assert_eq!(few.status, Status::Warning);
    assert!(few.fix.unwrap().contains("LimitNOFILE"));
    assert_eq!(open_files(text("nothing"), Whose::Ours).status, Status::Skipped);
    assert_eq!(open_files(unreadable(), Whose::Ours).status, Status::Skipped);
}

#[test]
fn a_nested_user_namespace_is_a_warning() {
    assert_eq!(user_namespace(text("         0          0 4294967295\n")).status, Status::Ok);
    let nested = user_namespace(text("0 1000 1\n1 100000 65536\n"));
    assert_eq!(nested.status, Status::Warning);
    assert!(nested.detail.contains("(0:1000:1, 1:100000:65536)"), "{}", nested.detail);
}

#[test]
fn the_nearest_existing_directory_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let top = fs::canonicalize(dir.path()).unwrap();
    assert_eq!(existing(&top.join("a/b/c")), top);
    fs::create_dir(top.join("a")).unwrap();
    std::os::unix::fs::symlink(top.join("a"), top.join("link")).unwrap();
    assert_eq!(existing(&top.join("link/b")), top.join("a"));
}

/// Needs CAP_SYS_ADMIN for its assertions; without it, it says that nothing was tried.
#[test]
fn trials_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let can_mount = read("/proc/self/status").is_ok_and(|status| holds(&status, SYS_ADMIN));
    if !can_mount {
        eprintln!("SKIPPED: trial mounts need CAP_SYS_ADMIN");
        return;
    }
    if let Err(error) = try_id_mapping(dir.path()) {
        eprintln!("SKIPPED: no id-mapped overlays here: {error}");
    }
    assert!(try_overlay(dir.path(), &[], true).is_some());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
