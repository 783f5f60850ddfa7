use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::*;

/// A server that answers every connection with these bytes and closes it; it lives as long as the set.
async fn server(answer: &'static [u8]) -> (SocketAddr, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            // The client may have gone.
            if stream.read(&mut request).await.is_ok() {
                stream.write_all(answer).await.unwrap_or_default();
            }
        }
    });
    (address, tasks)
}

async fn reach(scheme: &str, address: SocketAddr) -> Reach {
    let probe = UpstreamProbe::new().unwrap();
    probe.probe(&Upstream::at(&format!("{scheme}://{address}/v2/"))).await
}

#[tokio::test]
async fn every_answer_is_one_but_that_of_a_server_that_failed() {
    for (answer, expected) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..], Reach::There),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", Reach::There),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", Reach::There),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Reach::There),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", Reach::There),
        // Nobody is there who would answer what it leads to.
        (
            b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/v2/\r\nContent-Length: 0\r\n\r\n",
            Reach::There,
        ),
        (b"rubbish\r\n\r\n", Reach::There),
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", Reach::Away),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", Reach::Away),
        // Whoever closes the door has said nothing: a load balancer without anybody behind it.
        (b"", Reach::Away),
    ] {
        let (address, _tasks) = server(answer).await;
        assert_eq!(reach("http", address).await, expected, "{:?}", String::from_utf8_lossy(answer));
    }
}

#[tokio::test]
async fn what_tls_refuses_is_an_answer() {
    // A server that speaks HTTP without TLS, and one whose TLS is rubbish.
    for answer in
        [&b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"[..], b"\x15\x03\x01\x00\x02\x02\x28"]
    {
        let (address, _tasks) = server(answer).await;
        assert_eq!(reach("https", address).await, Reach::There);
    }
    let (address, _tasks) = server(b"").await;
    assert_eq!(reach("https", address).await, Reach::Away);
}

#[tokio::test]
async fn nobody_and_silence_are_no_answer() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(reach("http", free).await, Reach::Away);
    // Takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    for scheme in ["http", "https"] {
        assert_eq!(reach(scheme, silent.local_addr().unwrap()).await, Reach::Away);
    }
    // Drops what wants to connect, as a firewall does: its queue is full.
    let full = silent.local_addr().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&full, Duration::from_millis(300)) {
        held.push(stream);
    }
    assert_eq!(reach("http", full).await, Reach::Away);
    let unknown = Upstream::of("registry.invalid", false).unwrap();
    assert_eq!(UpstreamProbe::new().unwrap().probe(&unknown).await, Reach::Away);
}

/// Counts, and takes its time.
#[derive(Debug, Clone, Default)]
struct Slow {
    asked: Arc<AtomicUsize>,
    there: bool,
}

#[async_trait]
impl Probe for Slow {
    async fn probe(&self, _: &Upstream) -> Reach {
        self.asked.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(1)).await;
        if self.there { Reach::There } else { Reach::Away }
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_are_one_probe_and_it_is_believed_for_seconds() {
    for (there, reach, believed) in
        [(false, Reach::Away, BELIEVED_AWAY), (true, Reach::There, BELIEVED_THERE)]
    {
        let probe = Slow { there, ..Slow::default() };
        let asked = || probe.asked.load(Ordering::SeqCst);
        let probes = Probes::new(Box::new(probe.clone()));
        let (one, other) =
            (Upstream::of("r.example", false).unwrap(), Upstream::of("s.example", false).unwrap());
        let answers = futures::future::join_all((0..100).map(|_| probes.reach(&one))).await;
        assert!(answers.iter().all(|answer| *answer == reach));
        assert_eq!(asked(), 1);
        tokio::time::advance(believed.checked_sub(Duration::from_millis(1)).unwrap()).await;
        assert_eq!((probes.reach(&one).await, asked()), (reach, 1));
        assert_eq!((probes.reach(&other).await, asked()), (reach, 2));
        tokio::time::advance(believed).await;
        assert_eq!((probes.reach(&one).await, asked()), (reach, 3));
    }
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_leaves_the_question_to_the_next() {
    let probe = Slow::default();
    let probes = Probes::new(Box::new(probe.clone()));
    let one = Upstream::of("r.example", false).unwrap();
    let given_up = tokio::time::timeout(Duration::from_millis(10), probes.reach(&one)).await;
    assert!(given_up.is_err());
    assert_eq!(probes.reach(&one).await, Reach::Away);
    assert_eq!(probe.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn no_more_registries_are_remembered_than_there_is_room_for() {
    let probes = Probes::new(Box::new(Slow::default()));
    for number in 0..MOST_REGISTRIES * 2 {
        probes.reach(&Upstream::of(&format!("r{number}.example"), false).unwrap()).await;
        assert!(probes.known.lock().len() <= MOST_REGISTRIES);
    }
}
