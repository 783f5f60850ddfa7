//! Enough of S3 on a loopback port for the store's client, and everything that can go wrong with one.
//!
//! Speaks HTTP/1.1 by hand, so that an answer can be cut anywhere. Signatures are not checked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use speedy::object::{Objects, Settings, StoreOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What happens to a request. `speedy.json` is spared, so that faults hit what a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The answer comes after this time.
    Slow(Duration),
    /// This status with S3's error document.
    Status(u16, &'static str),
    /// Half the body, then the connection is closed.
    Truncated,
    /// One bit of the body is another.
    Flipped,
    /// The connection is closed without an answer.
    Dropped,
    /// Half the body, then nothing more.
    Stalled,
}

#[derive(Debug)]
struct State {
    objects: Mutex<BTreeMap<String, (Vec<u8>, SystemTime)>>,
    /// The fault, and for how many requests.
    fault: Mutex<(Fault, u64)>,
    requests: AtomicU64,
    /// The only key that is let in, if not all are.
    key: Mutex<Option<String>>,
}

/// A running server; ends with it.
#[derive(Debug)]
pub(crate) struct Server {
    state: Arc<State>,
    address: std::net::SocketAddr,
    _accepting: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            objects: Mutex::default(),
            fault: Mutex::new((Fault::None, 0)),
            requests: AtomicU64::new(0),
            key: Mutex::default(),
        });
        let mut accepting = JoinSet::new();
        let shared = Arc::clone(&state);
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                connections.spawn(async move {
                    // A client that goes away is none of the server's business.
                    drop(serve(stream, &state).await);
                });
            }
        });
        Server { state, address, _accepting: accepting }
    }

    /// A store on this server, below `prefix`.
    pub(crate) fn store(&self, prefix: &str, options: StoreOptions) -> Objects {
        self.store_in(&format!("s3://bucket/{prefix}"), options)
    }

    pub(crate) fn store_in(&self, url: &str, options: StoreOptions) -> Objects {
        self.store_with(url, options, &[("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "hunter2")])
    }

    /// A store on this server with these credentials.
    pub(crate) fn store_with(&self, url: &str, options: StoreOptions, settings: &[(&str, &str)]) -> Objects {
        let endpoint = ("AWS_ENDPOINT_URL".to_owned(), format!("http://{}", self.address));
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let settings: Settings = settings.chain([endpoint]).collect();
        Objects::open(url, &StoreOptions { settings, ..options }).unwrap()
    }

    /// From now on, only who signs with this key is let in.
    pub(crate) fn admit(&self, key: &str) {
        *self.state.key.lock() = Some(key.to_owned());
    }

    /// From now on, for all requests.
    pub(crate) fn fault(&self, fault: Fault) {
        *self.state.fault.lock() = (fault, u64::MAX);
    }

    /// For the next `times` requests.
    pub(crate) fn fault_times(&self, fault: Fault, times: u64) {
        *self.state.fault.lock() = (fault, times);
    }

    /// How many requests came since the last question.
    pub(crate) fn requests(&self) -> u64 {
        self.state.requests.swap(0, Ordering::Relaxed)
    }

    /// What is there, by key.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.state.objects.lock().keys().cloned().collect()
    }

    /// Loses an object.
    pub(crate) fn lose(&self, part: &str) {
        self.state.objects.lock().retain(|key, _| !key.contains(part));
    }

    /// Changes the bytes of all objects whose key contains `part`.
    pub(crate) fn spoil(&self, part: &str, how: impl Fn(&mut Vec<u8>)) {
        let mut objects = self.state.objects.lock();
        objects.iter_mut().filter(|(key, _)| key.contains(part)).for_each(|(_, (bytes, _))| how(bytes));
    }

    /// Makes all objects older.
    pub(crate) fn age(&self, by: Duration) {
        self.state.objects.lock().values_mut().for_each(|(_, modified)| *modified -= by);
    }
}

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    /// The key that signed it.
    key: String,
    body: Vec<u8>,
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<Request>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap());
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("content-length:").map(|n| n.trim().parse::<usize>().unwrap())
    });
    let signed = head.split_once("Credential=").and_then(|(_, rest)| rest.split('/').next());
    let key = signed.unwrap_or_default().to_owned();
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await?;
    let url = url::Url::parse(&format!("http://host{target}")).unwrap();
    let query = url.query_pairs().map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
    Ok(Some(Request { method, path: url.path().to_owned(), query, key, body }))
}

struct Response {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// What `content-length` says.
    announced: usize,
}

impl Response {
    fn new(status: u16, body: Vec<u8>) -> Response {
        Response { status, headers: String::new(), announced: body.len(), body }
    }

    fn error(status: u16, code: &str) -> Response {
        let text = format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{code} was wanted</Message></Error>"
        );
        Response::new(status, text.into_bytes())
    }
}

async fn serve(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    while let Some(request) = read_request(&mut stream).await? {
        state.requests.fetch_add(1, Ordering::Relaxed);
        let fault = if request.path.ends_with("/speedy.json") { Fault::None } else { take_fault(state) };
        match fault {
            Fault::Dropped => return Ok(()),
            Fault::Slow(by) => tokio::time::sleep(by).await,
            _ => {}
        }
        let mut response = match fault {
            Fault::Status(status, code) => Response::error(status, code),
            _ if state.key.lock().as_ref().is_some_and(|key| *key != request.key) => {
                Response::error(403, "InvalidAccessKeyId")
            }
            _ => answer(&request, state),
        };
        if fault == Fault::Flipped && request.method == "GET" {
            let middle = response.body.len() / 2;
            response.body[middle] ^= 0x10;
        }
        let mut head =
            format!("HTTP/1.1 {} Status\r\ncontent-length: {}\r\n", response.status, response.announced);
        head.push_str(&response.headers);
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await?;
        if request.method == "HEAD" {
            continue;
        }
        let half = &response.body[..response.body.len() / 2];
        match fault {
            Fault::Truncated => return stream.write_all(half).await,
            Fault::Stalled => {
                stream.write_all(half).await?;
                std::future::pending::<()>().await;
            }
            _ => stream.write_all(&response.body).await?,
        }
    }
    Ok(())
}

fn take_fault(state: &State) -> Fault {
    let mut fault = state.fault.lock();
    if fault.1 == 0 {
        return Fault::None;
    }
    fault.1 -= 1;
    fault.0
}

fn answer(request: &Request, state: &State) -> Response {
    let Some(key) = request.path.strip_prefix("/bucket") else { return Response::error(404, "NoSuchBucket") };
    let key = key.trim_start_matches('/').to_owned();
    let mut objects = state.objects.lock();
    match request.method.as_str() {
        "GET" if request.query.contains_key("list-type") => list(&request.query, &objects),
        "GET" | "HEAD" => match objects.get(&key) {
            None => Response::error(404, "NoSuchKey"),
            Some((bytes, modified)) => {
                let mut response = Response::new(200, bytes.clone());
                response.headers = format!("last-modified: {}\r\netag: \"e\"\r\n", rfc2822(*modified));
                response
            }
        },
        "PUT" => {
            objects.insert(key, (request.body.clone(), SystemTime::now()));
            let mut response = Response::new(200, Vec::new());
            response.headers = "etag: \"e\"\r\n".to_owned();
            response
        }
        "DELETE" => {
            objects.remove(&key);
            Response::new(204, Vec::new())
        }
        other => panic!("{other} {}", request.path),
    }
}

/// Three to a page, so that pages are turned.
fn list(query: &BTreeMap<String, String>, objects: &BTreeMap<String, (Vec<u8>, SystemTime)>) -> Response {
    let prefix = query.get("prefix").map_or("", String::as_str);
    let after = query.get("continuation-token").map_or("", String::as_str);
    let found: Vec<_> =
        objects.iter().filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after).take(4).collect();
    let mut text = "<?xml version=\"1.0\"?><ListBucketResult>".to_owned();
    for (key, (bytes, modified)) in found.iter().take(3) {
        let (size, date) = (bytes.len(), iso8601(*modified));
        text.push_str(&format!(
            "<Contents><Key>{key}</Key><LastModified>{date}</LastModified><ETag>\"e\"</ETag><Size>{size}</Size></Contents>"
        ));
    }
    if found.len() > 3 {
        text.push_str(&format!("<NextContinuationToken>{}</NextContinuationToken>", found[2].0));
    }
    text.push_str("</ListBucketResult>");
    Response::new(200, text.into_bytes())
}

/// Year, month, day, hour, minute, second.
fn civil(time: SystemTime) -> (i64, i64, i64, i64, i64, i64) {
    let seconds = i64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of the year 0, in eras of 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day, rest / 3600, rest / 60 % 60, rest % 60)
}

fn iso8601(time: SystemTime) -> String {
    let (year, month, day, h, m, s) = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.000Z")
}

fn rfc2822(time: SystemTime) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let (year, month, day, h, m, s) = civil(time);
    let days = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() / 86_400;
    let (name, month) =
        (DAYS[usize::try_from(days % 7).unwrap()], MONTHS[usize::try_from(month - 1).unwrap()]);
    format!("{name}, {day:02} {month} {year} {h:02}:{m:02}:{s:02} GMT")
}
