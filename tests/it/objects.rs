//! The store over a network that fails: clear errors in bounded time, and nothing lost.

use std::time::{Duration, Instant};

use bytes::Bytes;
use speedy::object::{Hedging, ObjectError, Objects, StoreOptions};

use crate::s3::{Fault, Server};

const BODY: &[u8] = b"0123456789012345678901234567890123456789";

/// Impatient enough for a test, on a real clock.
fn options() -> StoreOptions {
    StoreOptions {
        total: Duration::from_secs(4),
        attempt: Duration::from_millis(400),
        hedging: Hedging::Off,
        ..StoreOptions::default()
    }
}

async fn with_object() -> (Server, Objects) {
    let server = Server::start().await;
    let objects = server.store("some/prefix", options());
    objects.put("a", Bytes::from_static(BODY)).await.unwrap();
    server.requests();
    (server, objects)
}

#[tokio::test]
async fn s3_keeps_objects_below_its_prefix() {
    let (server, objects) = with_object().await;
    assert_eq!(server.keys(), ["some/prefix/a", "some/prefix/speedy.json"]);
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
    let info = objects.stat("a").await.unwrap().unwrap();
    assert_eq!((info.name.as_str(), info.size), ("a", 40));
    for n in 0..8 {
        objects.put(&format!("refs/ab/{n}"), Bytes::from(vec![n])).await.unwrap();
    }
    server.store("some/prefixes", options()).put("refs/ab/other", Bytes::new()).await.unwrap();
    let mut names: Vec<String> =
        objects.list("refs/ab", 100).await.unwrap().into_iter().map(|info| info.name).collect();
    names.sort();
    assert_eq!(names, (0..8).map(|n| format!("refs/ab/{n}")).collect::<Vec<_>>());
    assert_eq!(objects.list("refs/ab", 5).await.unwrap().len(), 5);
    assert_eq!(objects.list("refs/a", 5).await.unwrap(), []);
    objects.delete("a").await.unwrap();
    objects.delete("a").await.unwrap();
    assert_eq!(objects.stat("a").await.unwrap(), None);
    assert_eq!(objects.get("a", 100).await.unwrap(), None);
}

/// Each is over after two requests: another attempt has the object.
#[tokio::test]
async fn what_passes_is_ridden_out() {
    let (server, objects) = with_object().await;
    for fault in [
        Fault::Status(500, "InternalError"),
        Fault::Status(503, "SlowDown"),
        Fault::Truncated,
        Fault::Dropped,
        Fault::Stalled,
        Fault::Slow(Duration::from_secs(5)),
    ] {
        server.fault_times(fault, 2);
        assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY, "{fault:?}");
    }
    for fault in [Fault::Status(500, "InternalError"), Fault::Dropped] {
        server.fault_times(fault, 2);
        objects.put("b", Bytes::from_static(b"b")).await.unwrap();
        server.fault_times(fault, 2);
        assert_eq!(objects.list("", 9).await.unwrap().len(), 3, "{fault:?}");
        server.fault_times(fault, 2);
        objects.delete("b").await.unwrap();
    }
    let stats = objects.stats();
    assert_eq!((stats.retries, stats.opened), (24, 0), "{stats:?}");
}

#[tokio::test]
async fn o1_whatever_the_store_does_a_call_ends() {
    for fault in [
        Fault::Status(500, "InternalError"),
        Fault::Truncated,
        Fault::Dropped,
        Fault::Stalled,
        Fault::Slow(Duration::from_secs(5)),
    ] {
        let (server, objects) = with_object().await;
        server.fault(fault);
        let began = Instant::now();
        let error = objects.within(Duration::from_secs(2)).get("a", 100).await.unwrap_err();
        assert!(matches!(error, ObjectError::Unreachable(_)), "{fault:?}: {error}");
        assert!(error.to_string().contains("GET a"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(3), "{fault:?}: {:?}", began.elapsed());
        // And the next ones know it.
        let began = Instant::now();
        server.requests();
        for _ in 0..100 {
            assert!(matches!(objects.get("a", 100).await, Err(ObjectError::Unreachable(_))), "{fault:?}");
        }
        assert!(began.elapsed() < Duration::from_secs(1), "{fault:?}: {:?}", began.elapsed());
        assert_eq!(server.requests(), 0, "{fault:?}");
    }
}

#[tokio::test]
async fn a_store_that_is_not_there_is_said_to_be() {
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let settings = [
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "hunter2".to_owned()),
    ];
    let settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let objects = Objects::open("s3://bucket/x", &StoreOptions { settings, ..options() }).unwrap();
    let error = objects.get("a", 100).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Unreachable(told) if told.contains("refused")), "{error}");
}

#[tokio::test]
async fn refusals_are_not_retried_and_say_no_secret() {
    let (server, objects) = with_object().await;
    for (fault, part) in [
        (Fault::Status(403, "AccessDenied"), "AccessDenied"),
        (Fault::Status(403, "SignatureDoesNotMatch"), "SignatureDoesNotMatch"),
        (Fault::Status(401, "Unauthorized"), "Unauthorized"),
        (Fault::Status(400, "ExpiredToken"), "ExpiredToken"),
    ] {
        server.fault(fault);
        server.requests();
        for answer in [objects.get("a", 100).await.map(|_| ()), objects.put("b", Bytes::new()).await] {
            let error = answer.unwrap_err();
            assert!(matches!(error, ObjectError::Denied(_)), "{fault:?}: {error}");
            assert!(error.to_string().contains(part) && !error.to_string().contains("hunter2"), "{error}");
        }
        assert_eq!(server.requests(), 2, "{fault:?}");
    }
    server.fault(Fault::Status(301, "PermanentRedirect"));
    let error = objects.get("a", 100).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Rejected(told) if told.contains("region")), "{error}");
    server.fault(Fault::Status(507, "InsufficientStorage"));
    assert!(matches!(objects.put("b", Bytes::new()).await, Err(ObjectError::Full(_))));
    server.fault(Fault::None);
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
}

/// A node has credentials that may read only: nothing it does writes, not even a description of an empty store.
#[tokio::test]
async fn reading_needs_no_permission_to_write() {
    let server = Server::start().await;
    let objects = server.store("x", options());
    assert_eq!(objects.get("a", 100).await.unwrap(), None);
    assert_eq!(objects.stat("a").await.unwrap(), None);
    assert_eq!(objects.list("refs", 9).await.unwrap(), []);
    assert_eq!(server.keys(), Vec::<String>::new());
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_named_as_the_problem() {
    let server = Server::start().await;
    let objects = server.store_in("s3://elsewhere/x", options());
    let error = objects.get("a", 100).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Rejected(told) if told.contains("bucket")), "{error}");
}

/// The server announces more than there may be: nothing of it is read.
#[tokio::test]
async fn a_body_beyond_the_limit_is_not_read() {
    let (server, objects) = with_object().await;
    server.spoil("prefix/a", |bytes| bytes.resize(2 << 20, 7));
    let error = objects.get("a", 100).await.unwrap_err();
    assert!(matches!(error, ObjectError::TooLarge { size: 0x20_0000, limit: 100, .. }), "{error}");
    assert!(objects.stats().read < 1000, "only speedy.json was read");
}

#[tokio::test]
async fn a_slow_server_is_asked_twice() {
    let server = Server::start().await;
    let objects =
        server.store("x", StoreOptions { attempt: Duration::from_secs(8), ..StoreOptions::default() });
    objects.put("a", Bytes::from_static(BODY)).await.unwrap();
    for _ in 0..32 {
        objects.get("a", 100).await.unwrap();
    }
    server.fault_times(Fault::Slow(Duration::from_secs(5)), 1);
    let began = Instant::now();
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let stats = objects.stats();
    assert_eq!((stats.hedges_won, stats.retries), (1, 0), "{stats:?}");
}

/// Keys had to be given in the environment, so that a node whose keys were replaced had to be restarted. Whichever is replaced
/// first, the file or the store's own list of keys: no call fails.
#[tokio::test]
async fn credentials_rotate_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("credentials");
    let keys = |key: &str| {
        let text = format!("[node]\naws_access_key_id = {key}\naws_secret_access_key = hunter2-{key}\n");
        std::fs::write(dir.path().join("new"), text).unwrap();
        std::fs::rename(dir.path().join("new"), &file).unwrap();
    };
    let server = Server::start().await;
    server.admit("one");
    keys("one");
    let path = file.display().to_string();
    let settings = [("AWS_SHARED_CREDENTIALS_FILE", path.as_str()), ("AWS_PROFILE", "node")];
    let objects = server.store_with("s3://bucket/p", options(), &settings);
    objects.put("a", Bytes::from_static(BODY)).await.unwrap();

    // The store refuses the old keys before we have looked at the file again.
    keys("two");
    server.admit("two");
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
    let all = (0..20).map(|n| {
        let objects = objects.clone();
        async move { objects.put(&format!("b/{n}"), Bytes::from_static(BODY)).await }
    });
    keys("three");
    server.admit("three");
    for done in futures::future::join_all(all).await {
        done.unwrap();
    }
    assert_eq!(objects.list("b", 100).await.unwrap().len(), 20);

    // A refusal that nothing can be done about is told, without the secret, and is over when the file has the right keys.
    server.admit("four");
    let refused = objects.get("a", 100).await.unwrap_err();
    assert!(matches!(&refused, ObjectError::Denied(told) if !told.contains("hunter2")), "{refused}");
    keys("four");
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), BODY);
}

#[tokio::test]
async fn a_credentials_file_that_says_nothing_is_named() {
    let server = Server::start().await;
    let settings = [("AWS_SHARED_CREDENTIALS_FILE", "/nowhere/credentials")];
    let objects = server.store_with("s3://bucket/p", options(), &settings);
    let refused = objects.get("a", 100).await.unwrap_err();
    assert!(
        matches!(&refused, ObjectError::Denied(told) if told.contains("/nowhere/credentials")),
        "{refused}"
    );
    assert_eq!(server.requests(), 0, "nobody is asked without credentials");
}
