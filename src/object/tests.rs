//! The calls against a store that misbehaves on purpose, on a clock that stands still until everybody waits.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::*;

/// What a request meets.
#[derive(Debug, Clone)]
enum Fault {
    /// The answer begins only after this time.
    Late(Duration),
    /// No answer, ever.
    Silent,
    /// A transport error.
    Broken,
    /// A body of fewer bytes than announced.
    Cut,
    /// A body that stops in the middle.
    Stalled,
    /// Permission.
    Denied,
}

#[derive(Debug, Default)]
struct Faulty {
    inner: InMemory,
    /// Taken one for each request; when there are none left, `always`.
    faults: Mutex<VecDeque<Option<Fault>>>,
    always: Mutex<Option<Fault>>,
    requests: Mutex<u32>,
    under_way: Mutex<(u32, u32)>,
}

/// Counts a request as long as it lives.
struct UnderWay<'a>(&'a Faulty);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.lock().0 -= 1;
    }
}

impl Faulty {
    fn enter(&self) -> UnderWay<'_> {
        *self.requests.lock() += 1;
        let mut counts = self.under_way.lock();
        counts.0 += 1;
        counts.1 = counts.1.max(counts.0);
        UnderWay(self)
    }

    async fn suffer(&self) -> object_store::Result<Option<Fault>> {
        let planned = self.faults.lock().pop_front();
        let fault = planned.unwrap_or_else(|| self.always.lock().clone());
        match &fault {
            Some(Fault::Late(by)) => sleep(*by).await,
            Some(Fault::Silent) => std::future::pending().await,
            Some(Fault::Broken) => {
                return Err(object_store::Error::Generic {
                    store: "faulty",
                    source: "connection reset".into(),
                });
            }
            Some(Fault::Denied) => {
                return Err(object_store::Error::PermissionDenied {
                    path: "x".into(),
                    source: "not you".into(),
                });
            }
            _ => {}
        }
        Ok(fault)
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let _here = self.enter();
        self.suffer().await?;
        self.inner.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let _here = self.enter();
        let fault = self.suffer().await?;
        let found = self.inner.get_opts(at, options).await?;
        let (meta, range, attributes, extensions) =
            (found.meta.clone(), found.range.clone(), found.attributes.clone(), found.extensions.clone());
        let whole = found.bytes().await?;
        let half = whole.slice(..whole.len() / 2);
        let frames: BoxStream<'static, object_store::Result<Bytes>> = match fault {
            Some(Fault::Cut) => futures::stream::iter([Ok(half)]).boxed(),
            Some(Fault::Stalled) => {
                futures::stream::iter([Ok(half)]).chain(futures::stream::pending()).boxed()
            }
            _ => futures::stream::iter([Ok(half.clone()), Ok(whole.slice(half.len()..))]).boxed(),
        };
        Ok(GetResult { payload: GetResultPayload::Stream(frames), meta, range, attributes, extensions })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let fault = self.faults.lock().pop_front().flatten();
        match fault {
            Some(Fault::Silent) => futures::stream::pending().boxed(),
            Some(_) => futures::stream::iter([Err(object_store::Error::Generic {
                store: "faulty",
                source: "connection reset".into(),
            })])
            .boxed(),
            None => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn options() -> StoreOptions {
    StoreOptions { total: 30 * SECOND, attempt: 5 * SECOND, ..StoreOptions::default() }
}

/// A store with one object, `a` = `0123456789`, that is ready to be used.
async fn faulty(options: StoreOptions) -> (Arc<Faulty>, Objects) {
    let store = Arc::new(Faulty::default());
    let objects = Objects::over(Arc::clone(&store) as _, options);
    objects.put("a", Bytes::from_static(b"0123456789")).await.unwrap();
    *store.requests.lock() = 0;
    (store, objects)
}

impl Faulty {
    fn plan(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().extend(faults.into_iter().map(Some));
    }

    fn always(&self, fault: impl Into<Option<Fault>>) {
        *self.always.lock() = fault.into();
    }

    fn requests(&self) -> u32 {
        std::mem::take(&mut *self.requests.lock())
    }
}

#[tokio::test(start_paused = true)]
async fn transient_failures_are_retried_and_counted() {
    let (store, objects) = faulty(StoreOptions { hedging: Hedging::Off, ..options() }).await;
    for fault in [Fault::Broken, Fault::Cut, Fault::Stalled, Fault::Silent] {
        store.plan([fault.clone(), fault]);
        assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    }
    store.plan([Fault::Broken, Fault::Silent]);
    objects.put("b", Bytes::from_static(b"b")).await.unwrap();
    store.plan([Fault::Broken, Fault::Silent]);
    assert_eq!(objects.list("", 10).await.unwrap().len(), 3);
    let stats = objects.stats();
    assert_eq!((stats.unreachable, stats.opened), (0, 0));
    assert_eq!(stats.retries, 2 * 4 + 2 + 2);
    assert!(stats.failures >= stats.retries, "{stats:?}");
}

/// Told once, it will say the same again.
#[tokio::test(start_paused = true)]
async fn answers_are_not_asked_for_twice() {
    let (store, objects) = faulty(options()).await;
    assert_eq!(objects.get("missing", 100).await.unwrap(), None);
    assert_eq!(store.requests(), 1);
    assert!(matches!(objects.get("a", 9).await, Err(ObjectError::TooLarge { size: 10, limit: 9, .. })));
    assert_eq!(store.requests(), 1);
    store.plan([Fault::Denied]);
    assert!(matches!(objects.get("a", 100).await, Err(ObjectError::Denied(_))));
    assert_eq!(store.requests(), 1);
    assert_eq!(objects.stats().resting, None);
}

#[tokio::test(start_paused = true)]
async fn o1_a_call_ends_within_its_time() {
    for fault in [Fault::Silent, Fault::Stalled, Fault::Late(4 * SECOND)] {
        let (store, objects) = faulty(StoreOptions { hedging: Hedging::Off, ..options() }).await;
        store.always(fault.clone());
        let hasty = objects.within(3 * SECOND);
        let began = Instant::now();
        let error = hasty.get("a", 100).await.unwrap_err();
        assert!(matches!(error, ObjectError::Unreachable(_)), "{error}");
        assert!(began.elapsed() <= 3 * SECOND + SECOND / 10, "{fault:?}: {:?}", began.elapsed());
    }
}

/// The last attempt of a call may be cut short by its time: the ones before it have said enough.
#[tokio::test(start_paused = true)]
async fn a_call_that_failed_and_ran_out_of_time_is_telling() {
    let (store, objects) = faulty(StoreOptions { hedging: Hedging::Off, attempt: SECOND, ..options() }).await;
    store.always(Fault::Stalled);
    assert!(objects.within(SECOND * 3 / 2).get("a", 100).await.is_err());
    assert_eq!(objects.stats().opened, 1);
}

/// The first use of a store asks for its description too: both share the one time.
#[tokio::test(start_paused = true)]
async fn o1_holds_for_the_first_call() {
    let store = Arc::new(Faulty::default());
    let objects = Objects::over(Arc::clone(&store) as _, StoreOptions { hedging: Hedging::Off, ..options() });
    store.always(Fault::Late(2 * SECOND));
    let began = Instant::now();
    assert!(matches!(objects.within(3 * SECOND).get("a", 100).await, Err(ObjectError::Unreachable(_))));
    assert!(began.elapsed() <= 3 * SECOND + SECOND / 10);
}

/// A pull of many layers meets a store that does not answer: only the first lookup waits for it.
#[tokio::test(start_paused = true)]
async fn an_unreachable_store_costs_one_time_out() {
    let (store, objects) = faulty(options()).await;
    store.always(Fault::Silent);
    let began = Instant::now();
    for _ in 0..20 {
        assert!(matches!(objects.within(4 * SECOND).get("a", 100).await, Err(ObjectError::Unreachable(_))));
    }
    assert!(began.elapsed() <= 5 * SECOND, "{:?}", began.elapsed());
    let stats = objects.stats();
    assert_eq!((stats.unreachable, stats.refused, stats.opened), (1, 19, 1));
    assert!(stats.resting.is_some());

    // It is back, and found to be after a rest.
    store.always(None);
    sleep(stats.resting.unwrap()).await;
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    assert_eq!(objects.stats().resting, None);
}

/// A cluster that had been stopped was never found to be back: of the requests of one publish the first was the probe, the others
/// were refused, and their error cancelled the probe.
#[tokio::test(start_paused = true)]
async fn requests_that_fail_together_do_not_take_the_probe_with_them() {
    let (store, objects) = faulty(options()).await;
    store.always(Fault::Broken);
    objects.get("a", 100).await.unwrap_err();
    store.always(Fault::Late(Duration::from_millis(50)));
    sleep(objects.stats().resting.unwrap()).await;
    let both = tokio::try_join!(objects.get("a", 100), objects.get("a", 100));
    assert!(both.is_ok(), "{both:?}");
    assert_eq!(objects.stats().resting, None);
}

#[tokio::test(start_paused = true)]
async fn who_needs_the_object_waits_for_the_store() {
    let (store, objects) = faulty(options()).await;
    store.always(Fault::Broken);
    let (hasty, patient) = (objects.clone(), objects.patient(60 * SECOND));
    assert!(hasty.get("a", 100).await.is_err());
    let began = Instant::now();
    let back = async {
        sleep(12 * SECOND).await;
        store.always(None);
    };
    let (found, ()) = futures::join!(patient.get("a", 100), back);
    assert_eq!(found.unwrap().unwrap(), "0123456789");
    assert!(began.elapsed() < 30 * SECOND, "{:?}", began.elapsed());

    store.always(Fault::Broken);
    let began = Instant::now();
    assert!(patient.get("a", 100).await.is_err());
    assert!(began.elapsed() <= 61 * SECOND);
}

/// An outage must not be multiplied: a thousand calls make few requests more than they would have without retries.
#[tokio::test(start_paused = true)]
async fn an_outage_is_not_multiplied() {
    let (store, objects) = faulty(options()).await;
    store.always(Fault::Broken);
    let calls = (0..1000).map(|_| objects.get("a", 100));
    assert!(futures::future::join_all(calls).await.iter().all(Result::is_err));
    assert!(store.requests() < 200, "{:?}", objects.stats());
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_is_asked_for_a_second_time() {
    let (store, objects) = faulty(options()).await;
    for _ in 0..32 {
        objects.get("a", 100).await.unwrap();
    }
    store.requests();
    store.plan([Fault::Late(4 * SECOND)]);
    let began = Instant::now();
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    assert!(began.elapsed() < SECOND / 10, "{:?}", began.elapsed());
    assert_eq!(store.requests(), 2);
    let stats = objects.stats();
    assert_eq!((stats.hedges, stats.hedges_won, stats.retries), (1, 1, 0));

    // Slow as a whole: the budget ends the second requests.
    store.always(Fault::Late(SECOND / 2));
    for _ in 0..200 {
        objects.get("a", 100).await.unwrap();
    }
    let hedges = objects.stats().hedges;
    assert!(hedges < 200 * 3 / 4, "{hedges} of 200");
}

#[tokio::test(start_paused = true)]
async fn a_failed_hedge_does_not_fail_the_first_request() {
    let (store, objects) = faulty(options()).await;
    store.plan([Fault::Late(3 * SECOND), Fault::Broken]);
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    store.plan([Fault::Late(3 * SECOND), Fault::Silent]);
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    assert_eq!((objects.stats().retries, objects.stats().hedges_won), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn only_so_many_requests_are_under_way() {
    let (store, objects) =
        faulty(StoreOptions { reads: 3, writes: 2, hedging: Hedging::Off, ..options() }).await;
    store.always(Fault::Late(SECOND / 10));
    let reads = futures::future::join_all((0..20).map(|_| objects.get("a", 100)));
    assert!(reads.await.iter().all(Result::is_ok));
    assert_eq!(store.under_way.lock().1, 3);
    store.under_way.lock().1 = 0;
    let writes = futures::future::join_all((0..20).map(|i| objects.put("b", Bytes::from(vec![i]))));
    assert!(writes.await.iter().all(Result::is_ok));
    assert_eq!(store.under_way.lock().1, 2);

    // Those who wait for a place wait no longer than their time, and that says nothing of the store.
    store.always(Fault::Late(3 * SECOND));
    let hasty = objects.within(4 * SECOND);
    let answers = futures::future::join_all((0..20).map(|_| hasty.get("a", 100))).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
    assert_eq!(objects.stats().resting, None);
}

/// A caller in a great hurry must not make the store look dead to all others.
#[tokio::test(start_paused = true)]
async fn hurry_is_not_held_against_the_store() {
    let (store, objects) = faulty(StoreOptions { hedging: Hedging::Off, ..options() }).await;
    store.always(Fault::Late(SECOND / 2));
    for _ in 0..50 {
        assert!(objects.within(SECOND / 10).get("a", 100).await.is_err());
    }
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    assert_eq!(objects.stats().opened, 0);
}

/// Whoever probes may be cancelled: the next one probes.
#[tokio::test(start_paused = true)]
async fn a_cancelled_call_leaves_nothing_behind() {
    let (store, objects) = faulty(StoreOptions { reads: 1, ..options() }).await;
    store.always(Fault::Silent);
    assert!(objects.get("a", 100).await.is_err());
    sleep(60 * SECOND).await;
    drop(objects.get("a", 100).now_or_never());
    store.always(None);
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
}

#[tokio::test(start_paused = true)]
async fn the_first_writer_describes_the_store() {
    let store = Arc::new(Faulty::default());
    let (reader, writer) = (
        Objects::over(Arc::clone(&store) as _, options()),
        Objects::over(Arc::clone(&store) as _, options()),
    );
    for _ in 0..5 {
        assert_eq!(reader.get("a", 100).await.unwrap(), None);
    }
    assert_eq!(store.requests(), 1 + 5, "the description is asked for once");
    assert_eq!(
        reader.fetch(layout::STORE, 1000, reader.deadline()).await.unwrap(),
        None,
        "reading writes nothing"
    );
    // Many at once write it once.
    store.requests();
    let puts = futures::future::join_all((0..10).map(|i| writer.put("a", Bytes::from(vec![i])))).await;
    assert!(puts.iter().all(Result::is_ok));
    assert_eq!(store.requests(), 3 + 10);
    let written = reader.get(layout::STORE, 1000).await.unwrap().unwrap();
    assert_eq!(written, layout::Description::own().to_json());
}

#[tokio::test(start_paused = true)]
async fn o4_an_unknown_format_is_refused() {
    let (_store, objects) = faulty(options()).await;
    let describe = async |json: &str| {
        objects.store(layout::STORE, Bytes::from(json.to_owned()), objects.deadline()).await.unwrap();
        objects.handle.forget();
    };
    describe(r#"{"format": 2, "something": "new"}"#).await;
    assert!(matches!(objects.get("a", 100).await, Err(ObjectError::Format { found: 2, known: 1 })));
    assert!(matches!(objects.put("a", Bytes::new()).await, Err(ObjectError::Format { .. })));
    assert!(matches!(objects.list("", 9).await, Err(ObjectError::Format { .. })));
    assert!(matches!(objects.stat("a").await, Err(ObjectError::Format { .. })));
    assert!(matches!(objects.delete("a").await, Err(ObjectError::Format { .. })));
    assert!(matches!(objects.touch("a").await, Err(ObjectError::Format { .. })));
    for bad in ["", "{", "[]", r#"{"format": "1"}"#, r#"{"format": 1}"#, r#"{"format": -1}"#] {
        describe(bad).await;
        let error = objects.get("a", 100).await.unwrap_err();
        assert!(matches!(error, ObjectError::Foreign { .. }), "{bad}: {error}");
    }
    // Set right again: no restart is needed.
    describe(&String::from_utf8(layout::Description::own().to_json()).unwrap()).await;
    assert!(objects.get("a", 100).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn other_parameters_can_be_read_and_not_written() {
    let (_store, objects) = faulty(options()).await;
    let mut other = layout::Description::own();
    other.cutting.average *= 2;
    objects.store(layout::STORE, Bytes::from(other.to_json()), objects.deadline()).await.unwrap();
    objects.handle.forget();
    assert_eq!(objects.get("a", 100).await.unwrap().unwrap(), "0123456789");
    let error = objects.put("a", Bytes::new()).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn urls_that_name_no_store_say_what_is_wrong() {
    for (url, part) in [
        ("", "expected"),
        ("/var/lib/store", "expected"),
        ("file://relative/dir", "file:///DIR"),
        ("file:///", "for the store alone"),
        ("ftp://host/x", "ftp is no kind of store"),
        ("s3://", "bucket"),
        ("s3://bucket:9000/x", "AWS_ENDPOINT_URL"),
        ("s3://key:SECRET@bucket/x", "credentials do not belong"),
        ("az://c/p?sig=SECRET", "no query"),
    ] {
        let error = Objects::open(url, &StoreOptions::default()).unwrap_err();
        assert!(matches!(error, ObjectError::Url { .. }), "{url}: {error}");
        assert!(error.to_string().contains(part), "{url}: {error}");
        assert!(!error.to_string().contains("SECRET"), "{error}");
    }
}

#[tokio::test]
async fn settings_show_no_secrets() {
    let settings: Settings =
        [("AWS_SECRET_ACCESS_KEY", "hunter2"), ("AWS_ACCESS_KEY_ID", "key"), ("AWS_ENDPOINT_URL", "")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into_iter()
            .collect();
    let options = StoreOptions { settings, ..StoreOptions::default() };
    let objects = Objects::open("s3://bucket/prefix", &options).unwrap();
    let shown = format!("{options:?} {objects:?}");
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(format!("{options:?}").contains("AWS_SECRET_ACCESS_KEY"));
}

/// Half a key pair is a mistake that should show at once.
#[tokio::test]
async fn half_a_key_pair_is_refused() {
    let settings: Settings = [("AWS_ACCESS_KEY_ID".to_owned(), "key".to_owned())].into_iter().collect();
    let options = StoreOptions { settings, ..StoreOptions::default() };
    assert!(matches!(Objects::open("s3://bucket", &options), Err(ObjectError::Url { .. })));
}

mod directory {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn open(dir: &std::path::Path) -> Objects {
        Objects::open(&format!("file://{}", dir.display()), &StoreOptions::default()).unwrap()
    }

    #[tokio::test]
    async fn objects_are_files_that_only_the_owner_can_reach() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("new/store with spaces");
        let objects = open(&std::path::PathBuf::from(root.display().to_string().replace(' ', "%20")));
        assert!(!root.exists(), "opening touches nothing");
        objects.put("chunks/ab/abcd", Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(std::fs::read(root.join("chunks/ab/abcd")).unwrap(), b"x");
        assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(root.join("speedy.json").is_file());
        assert_eq!(objects.list("chunks", 9).await.unwrap()[0].name, "chunks/ab/abcd");
        objects.delete("chunks/ab/abcd").await.unwrap();
        objects.delete("chunks/ab/abcd").await.unwrap();
        assert_eq!(objects.get("chunks/ab/abcd", 9).await.unwrap(), None);
    }

    #[tokio::test]
    async fn no_name_leads_out_of_the_directory() {
        let top = tempfile::tempdir().unwrap();
        let objects = open(&top.path().join("store"));
        for name in ["../out", "/etc/out", "a/../../out", "..", ".", "a//b", "%2e%2e/out", "a\0b", "..\\out"]
        {
            if objects.put(name, Bytes::from_static(b"x")).await.is_ok() {
                assert_eq!(objects.get(name, 9).await.unwrap().unwrap(), "x", "{name:?}");
            }
        }
        let outside: Vec<_> =
            std::fs::read_dir(top.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(outside, ["store"]);
        assert!(!std::path::Path::new("/etc/out").exists());
    }

    #[tokio::test]
    async fn what_a_crash_left_is_not_listed_and_is_tidied() {
        let top = tempfile::tempdir().unwrap();
        let objects = open(top.path());
        objects.put("chunks/ab/abcd", Bytes::from_static(b"x")).await.unwrap();
        let torn = top.path().join("chunks/ab/abce#1");
        std::fs::write(&torn, b"half").unwrap();
        assert_eq!(objects.list("chunks", 9).await.unwrap().len(), 1);
        assert_eq!(objects.tidy(Duration::from_secs(3600)).await.unwrap(), 0, "it may be being written");
        assert!(torn.exists());
        assert_eq!(objects.tidy(Duration::ZERO).await.unwrap(), 1);
        assert!(!torn.exists());
        assert!(objects.get("chunks/ab/abcd", 9).await.unwrap().is_some());
    }

    /// Each image and each layer that a store ever had left a directory.
    #[tokio::test]
    async fn empty_directories_go_when_they_are_old() {
        let top = tempfile::tempdir().unwrap();
        let objects = open(top.path());
        let hour = Duration::from_secs(3600);
        for name in ["refs/ab/abcd/1", "refs/ab/abce/1", "chunks/cd/cdef"] {
            objects.put(name, Bytes::from_static(b"x")).await.unwrap();
            objects.delete(name).await.unwrap();
        }
        objects.put("refs/ab/abce/2", Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(objects.tidy(hour).await.unwrap(), 0, "somebody may be about to use them");
        assert_eq!(objects.tidy(Duration::ZERO).await.unwrap(), 1);
        assert!(!top.path().join("refs/ab/abcd").exists());
        assert!(top.path().join("refs/ab").exists() && top.path().join("chunks/cd").exists());
        objects.put("refs/ab/abcd/1", Bytes::from_static(b"y")).await.unwrap();
        assert_eq!(objects.list("refs", 9).await.unwrap().len(), 2);
    }

    /// Directories go here however young they are, so a write may fail; one that was answered is there.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_written_beside_a_removal_is_there() {
        let top = tempfile::tempdir().unwrap();
        let objects = open(top.path());
        let (mut written, mut removed) = (0, 0);
        let over = AtomicBool::new(false);
        let write = async {
            for n in 0..100 {
                let name = format!("refs/ab/abcd/{n}");
                if objects.put(&name, Bytes::from_static(b"x")).await.is_ok() {
                    written += 1;
                    assert!(objects.stat(&name).await.unwrap().is_some(), "{n}");
                }
                objects.delete(&name).await.unwrap();
            }
            over.store(true, Ordering::SeqCst);
        };
        let remove = async {
            while !over.load(Ordering::SeqCst) {
                removed += objects.tidy(Duration::ZERO).await.unwrap();
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::join!(write, remove);
        assert!(written > 0 && removed > 0, "{written} {removed}");
    }

    #[tokio::test]
    async fn an_object_is_made_young() {
        let top = tempfile::tempdir().unwrap();
        let objects = open(top.path());
        objects.put("a", Bytes::from_static(b"x")).await.unwrap();
        let file = std::fs::File::open(top.path().join("a")).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        file.set_modified(old).unwrap();
        assert_eq!(objects.stat("a").await.unwrap().unwrap().modified, 1000);
        assert_eq!(objects.touch("a").await.unwrap(), Touched::Done);
        assert!(file.metadata().unwrap().modified().unwrap().elapsed().unwrap() < Duration::from_secs(60));
        assert_eq!(objects.touch("b").await.unwrap(), Touched::Missing);
        assert_eq!(Objects::memory().touch("a").await.unwrap(), Touched::Unsupported);
    }

    #[tokio::test]
    async fn a_file_in_place_of_the_directory_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let objects = open(file.path()).within(Duration::from_secs(5));
        let error = objects.get("a", 9).await.unwrap_err();
        assert!(matches!(error, ObjectError::Rejected(_) | ObjectError::Unreachable(_)), "{error}");
    }
}
