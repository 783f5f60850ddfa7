//! Applying layers to active snapshots, as far as neither root nor mounts are needed: layer images and errors.

use std::path::Path;
use std::sync::Arc;

use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::driver::{Driver, Mount};
use speedy::image::{ImageError, Limit, Limits};
use speedy::layer::LayerStore;
use speedy::layer::attach::Attacher;
use speedy::oci::Digest;
use speedy::snapshot::apply::{Applied, Applier, ApplyError, ApplyRequest, How};
use speedy::snapshot::layers::Layers;
use speedy::snapshot::metastore::{LayerChoice, MetaStore, NewSnapshot};
use speedy::snapshot::{Kind, SnapshotError, Timestamp};

use crate::layers::{Item, Tar};
use crate::support::{key, no_labels, runtime};

/// Prepares a snapshot as for an image's layer and applies a layer to it.
async fn apply(root: &Path, name: &str, limits: Limits, tar: Vec<u8>) -> Result<Applied, SnapshotError> {
    let meta = Arc::new(MetaStore::open(root, "overlayfs").unwrap());
    let driver: Arc<dyn Driver> = Arc::new(Overlay::open(root, OverlayOptions::default()).unwrap());
    let store = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
    let layers = Arc::new(Layers::new(Arc::clone(&meta), store, None, None));
    let id = meta.reserve(1).await.unwrap()[0];
    driver.reserve(&[id]).unwrap();
    let (kind, labels) = (Kind::Active, no_labels());
    let key = key(&format!("default/1/extract-{name}"));
    meta.create(NewSnapshot { id, key, parent: None, kind, labels, now: Timestamp(1) }, LayerChoice::Own)
        .await
        .unwrap();
    let mount = Mount {
        kind: "bind".into(),
        source: root.join(format!("l/{}/fs", id.serial)).display().to_string(),
        options: vec!["rw".into(), "rbind".into()],
    };
    let request = ApplyRequest {
        blob: Digest::parse(&format!("sha256:{}", "b".repeat(64))).unwrap(),
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        mounts: vec![mount],
        open: Arc::new(move || Ok(Box::new(std::io::Cursor::new(tar.clone())))),
    };
    let applied = Applier::new(Arc::clone(&meta), driver, Some(layers), limits, root).apply(request).await;
    meta.close();
    applied
}

fn files(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("layer")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn an_applied_layer_is_one_image_and_not_new_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::of([Item::file("etc/passwd", b"root")]);
    let applied = runtime().block_on(apply(dir.path(), "a", Limits::default(), tar.clone())).unwrap();
    assert_eq!((applied.how, applied.tar_size), (How::Image, tar.len() as u64));
    let found = files(dir.path());
    assert!(found.len() == 1 && found[0].ends_with(".erofs"), "{found:?}");
}

#[test]
fn a_layer_that_is_too_long_is_refused_and_leaves_an_id_to_be_freed() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::of([Item::file("long", [1; 100_000])]);
    let limits = Limits { plain: 50_000, ..Limits::default() };
    let refused = runtime().block_on(apply(dir.path(), "a", limits, tar)).unwrap_err();
    let message = format!("{refused}");
    let SnapshotError::Apply(ApplyError::Layer { source: ImageError::Limit { limit, .. }, .. }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!(limit, Limit::Plain);
    assert!(message.ends_with("the layer has more than 50000 uncompressed bytes"), "{message}");
    assert!(!files(dir.path()).iter().any(|name| name.ends_with(".erofs") || name.ends_with(".new")));
}

/// A layer image's file is lost, and the layer is pulled again: the record is as good as it was, if it is of the image that is made now.
#[test]
fn a_lost_file_comes_back_only_as_what_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let again = |name: &'static str| {
        let image = files(dir.path()).into_iter().find(|name| name.ends_with(".erofs")).unwrap();
        let image = dir.path().join("layer").join(image);
        std::fs::remove_file(&image).unwrap();
        let tar = Tar::of([Item::file("etc/passwd", b"root")]);
        let applied = runtime().block_on(apply(dir.path(), name, Limits::default(), tar)).unwrap();
        (applied.how, image.exists())
    };
    let tar = Tar::of([Item::file("etc/passwd", b"root")]);
    let first = runtime().block_on(apply(dir.path(), "a", Limits::default(), tar)).unwrap();
    assert_eq!(first.how, How::Image);
    assert_eq!(again("b"), (How::Image, true));
    // As if an older version had made it, whose images had more metadata.
    let records = rusqlite::Connection::open(dir.path().join("metadata.db")).unwrap();
    let older = "UPDATE layer SET metadata_length = metadata_length + 8192, image_size = image_size + 8192";
    assert_eq!(records.execute(older, []).unwrap(), 1);
    drop(records);
    assert_eq!(again("c"), (How::Files, false));
}
