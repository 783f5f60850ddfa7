//! The real `speedy gc` on a directory, killed at any point, and run again.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use speedy::content::ContentStore;
use speedy::content::name::ImageName;
use speedy::content::survey::Survey;
use speedy::content::trust::Trust;
use speedy::object::{Objects, StoreOptions};

use super::support::{Image, chain, digest, key, node};

const ROUNDS: u64 = 12;

fn name(reference: &str, layers: &[&str]) -> ImageName {
    ImageName {
        reference: reference.to_owned(),
        platform: "linux/amd64".to_owned(),
        target_media_type: String::new(),
        target: digest("manifest"),
        media_type: String::new(),
        manifest: digest("manifest"),
        documents: Vec::new(),
        chains: layers.iter().map(|layer| chain(layer)).collect(),
    }
}

/// Everything was written a hundred days ago.
fn grow_old(dir: &Path) {
    let then = SystemTime::now() - Duration::from_secs(100 * 24 * 3600);
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => grow_old(&entry.path()),
            false => std::fs::File::open(entry.path()).unwrap().set_modified(then).unwrap(),
        }
    }
}

fn gc(store: &str, root: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
    command.args(["gc", "--json", "--store", store, "--root"]).arg(root).args(more);
    command.env_clear().stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn json(mut command: Command) -> serde_json::Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A store in this directory with an image that has a name, of a layer of so many bytes; its URL, its objects and who publishes to it.
async fn store_with_kept(top: &Path, bytes: u64) -> (String, Objects, ContentStore) {
    let store = format!("file://{}", top.display());
    let objects = Objects::open(&store, &StoreOptions::default()).unwrap();
    let (content, _) = node(&objects, key(1), Trust::Keys(Vec::new()));
    let kept = Image::make(top.parent().unwrap(), 1, bytes);
    kept.publish(&content, &[chain("kept")]).await.unwrap();
    content.publish_name(&name("r.example/kept:1", &["kept"]), &[]).await.unwrap();
    (store, objects, content)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_that_is_killed_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let (top, root) = (dir.path().join("store"), dir.path().join("root"));
    let (store, objects, content) = store_with_kept(&top, 2 << 20).await;
    for n in 0..6_u64 {
        let image = Image::make(dir.path(), 10 + n, 3 << 20);
        image.publish(&content, &[chain(&format!("gone {n}"))]).await.unwrap();
    }
    grow_old(&top);
    let all = ["--execute", "--alone"];
    let slow = ["--execute", "--alone", "--rate", "40"];
    for round in 0..ROUNDS {
        let mut running = gc(&store, &root, &slow).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(20 + round * 60)).await;
        running.kill().unwrap();
        running.wait().unwrap();
        let survey = Survey::of(objects.clone(), &|_| ()).await.unwrap();
        assert!(survey.images.len() == 1 && survey.images[0].is_complete(), "{survey:?}");
        if round == ROUNDS / 2 {
            // The refs are gone by now; what they needed is young, or may go.
            json(gc(&store, &root, &all));
            grow_old(&top);
        }
    }
    json(gc(&store, &root, &all));
    let left = json(gc(&store, &root, &[]));
    assert_eq!((&left["dead"]["objects"], &left["later"]["objects"]), (&0.into(), &0.into()), "{left}");
    assert_eq!(left["executed"], false);
    let survey = Survey::of(objects, &|_| ()).await.unwrap();
    assert!(survey.images[0].is_complete() && survey.unused_bytes == 0, "{survey:?}");
}

/// A mistake in a command line deletes nothing and says what to do.
#[test]
fn a_short_grace_period_is_refused_by_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let store = format!("file://{}", dir.path().display());
    for (flags, told) in [
        (&["--grace", "1h"][..], "--alone"),
        (&["--grace", "soon"], "14d, 36h or 90m"),
        (&["--rate", "0"], "0"),
    ] {
        let output = gc(&store, dir.path(), flags).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(told), "{error}");
    }
}

/// Where nothing was to be deleted publishers were told for a minute that something was; and of a plan that nothing would execute it was said
/// that there is nothing to delete.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_to_delete_takes_no_time_and_a_refusal_is_foreseen() {
    let dir = tempfile::tempdir().unwrap();
    let (top, root) = (dir.path().join("store"), dir.path().join("root"));
    let (store, objects, _) = store_with_kept(&top, 1 << 20).await;
    grow_old(&top);
    let began = Instant::now();
    let sound = json(gc(&store, &root, &["--execute"]));
    assert_eq!(
        (&sound["executed"], &sound["freed"]["total"]["objects"]),
        (&true.into(), &0.into()),
        "{sound}"
    );
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert!(sound["refused"].is_null(), "{sound}");

    let [info] = &objects.list("indexes", 2).await.unwrap()[..] else { panic!("one index") };
    objects.put(&info.name, bytes::Bytes::from_static(b"no index")).await.unwrap();
    let damaged = json(gc(&store, &root, &[]));
    let refused = damaged["refused"].as_str().unwrap();
    assert!(refused.contains(&info.name) && refused.contains("speedy fsck --repair"), "{refused}");
    let told = gc(&store, &root, &["--execute"]).output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&told.stderr).contains(refused), "{told:?}");
}
