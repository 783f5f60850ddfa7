//! The snapshots API through one containerd: the same calls to several of its snapshotters, interleaved, as a table of medians
//! and ratios. `contrib/bench rpc` starts what this needs and calls it:
//!
//! `rpc --containerd SOCKET [--rounds N] [--cycles N] [--clients 1,16] [--list N] SNAPSHOTTER...`
//!
//! The first snapshotter is what the others are compared with. A cycle is Prepare on a committed parent, Mounts, Commit,
//! Remove. containerd's collector should be off (`mutation_threshold = 0`), so that it does not run in somebody else's round;
//! its cost is measured on its own: one pass, synchronous, after the cycles of each round, and one over a long List.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use speedy::proto::containerd::services::leases::v1 as leases;
use speedy::proto::containerd::services::leases::v1::leases_client::LeasesClient;
use speedy::proto::containerd::services::snapshots::v1 as snapshots;
use speedy::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use tokio::task::JoinSet;
use tonic::Request;
use tonic::transport::Channel;

const NAMESPACE: &str = "bench";

#[derive(Debug, Parser)]
struct Args {
    /// containerd's socket
    #[arg(long)]
    containerd: PathBuf,
    /// How often each snapshotter has its turn
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Cycles in one turn, shared by its clients
    #[arg(long, default_value_t = 480)]
    cycles: usize,
    /// Numbers of concurrent clients
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16])]
    clients: Vec<usize>,
    /// Snapshots to list; 0 for no list
    #[arg(long, default_value_t = 10_000)]
    list: usize,
    /// The socket is a snapshotter's own, not containerd's: there is no collector to wait for
    #[arg(long)]
    direct: bool,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
    /// Names as in containerd's configuration
    #[arg(required = true, num_args = 1..)]
    snapshotters: Vec<String>,
}

const CALLS: [&str; 4] = ["Prepare", "Mounts", "Commit", "Remove"];

/// What one turn took.
#[derive(Debug)]
struct Turn {
    calls: [Vec<Duration>; CALLS.len()],
    cycle: Duration,
    collect: Duration,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let channel = speedy::containerd::connect(&args.containerd).await.context("connect")?;
    for clients in &args.clients {
        compare_cycles(&args, &channel, *clients).await?;
    }
    if args.list > 0 {
        compare_list(&args, &channel).await?;
    }
    Ok(())
}

async fn compare_cycles(args: &Args, channel: &Channel, clients: usize) -> Result<()> {
    let mut turns: HashMap<&str, Vec<Turn>> = HashMap::new();
    for name in &args.snapshotters {
        turn(args, channel, name, clients, args.cycles / 4).await?;
    }
    for round in 0..args.rounds {
        let mut order: Vec<&String> = args.snapshotters.iter().collect();
        let first = round % order.len();
        order.rotate_left(first);
        for name in order {
            let turn = turn(args, channel, name, clients, args.cycles).await?;
            turns.entry(name).or_default().push(turn);
        }
    }
    println!(
        "\n{clients} client(s), {} rounds of {} cycles, interleaved; medians of rounds, ratio to {}\n",
        args.rounds, args.cycles, args.snapshotters[0]
    );
    header(&args.snapshotters, "");
    for (at, call) in CALLS.iter().enumerate() {
        row(args, &turns, &format!("{call} (ms)"), |turn| ms(median(turn.calls[at].clone())));
    }
    row(args, &turns, "cycle (ms of wall time)", |turn| ms(turn.cycle));
    row(args, &turns, "collect all of a round (ms)", |turn| ms(turn.collect));
    Ok(())
}

/// One snapshotter's turn.
async fn turn(args: &Args, channel: &Channel, name: &str, clients: usize, cycles: usize) -> Result<Turn> {
    let base = unique("base");
    let mut client = SnapshotsClient::new(channel.clone());
    prepare(&mut client, name, &format!("{base}-key"), "").await?;
    commit(&mut client, name, &base, &format!("{base}-key")).await?;

    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for task in 0..clients {
        let (mut client, name, base) = (client.clone(), name.to_owned(), base.clone());
        let cycles = cycles / clients;
        tasks.spawn(async move {
            let mut took: [Vec<Duration>; CALLS.len()] = Default::default();
            for cycle in 0..cycles {
                let key = format!("{base}-{task}-{cycle}");
                let committed = format!("{key}-done");
                let mut at = Instant::now();
                let mut lap = |call: usize| {
                    took[call].push(at.elapsed());
                    at = Instant::now();
                };
                prepare(&mut client, &name, &key, &base).await?;
                lap(0);
                mounts(&mut client, &name, &key).await?;
                lap(1);
                commit(&mut client, &name, &committed, &key).await?;
                lap(2);
                remove(&mut client, &name, &committed).await?;
                lap(3);
            }
            anyhow::Ok(took)
        });
    }
    let mut calls: [Vec<Duration>; CALLS.len()] = Default::default();
    while let Some(took) = tasks.join_next().await {
        for (all, some) in calls.iter_mut().zip(took??) {
            all.extend(some);
        }
    }
    let wall = began.elapsed();
    remove(&mut client, name, &base).await?;
    let collect = if args.direct { Duration::ZERO } else { collect(channel).await? };
    let cycle = wall / u32::try_from(cycles.max(1))?;
    Ok(Turn { calls, cycle, collect })
}

async fn compare_list(args: &Args, channel: &Channel) -> Result<()> {
    let mut client = SnapshotsClient::new(channel.clone());
    let base = unique("list");
    for name in &args.snapshotters {
        // One more for each round that removes one.
        fill(channel, name, &base, args.list + args.rounds).await?;
    }
    let mut lists: HashMap<&str, Vec<Duration>> = HashMap::new();
    let mut passes: HashMap<&str, Vec<Duration>> = HashMap::new();
    for _ in 0..args.rounds {
        for name in &args.snapshotters {
            let began = Instant::now();
            let found = list(&mut client, name).await?;
            lists.entry(name).or_default().push(began.elapsed());
            anyhow::ensure!(found >= args.list, "{name} listed {found} of {}", args.list);
            // One removal makes this snapshotter, and only it, part of the next pass, which lists all of it.
            remove(&mut client, name, &format!("{base}-{}", lists[name.as_str()].len())).await?;
            passes.entry(name).or_default().push(collect(channel).await?);
        }
    }
    println!(
        "\n{} snapshots, {} rounds, interleaved; medians, ratio to {}\n",
        args.list, args.rounds, args.snapshotters[0]
    );
    header(&args.snapshotters, "");
    let median_of = |all: &HashMap<&str, Vec<Duration>>, name: &str| ms(median(all[name].clone()));
    print_row(args, "List by a client of containerd (ms)", |name| median_of(&lists, name));
    print_row(args, "collector's pass (ms)", |name| median_of(&passes, name));
    Ok(())
}

async fn fill(channel: &Channel, name: &str, base: &str, count: usize) -> Result<()> {
    let mut tasks = JoinSet::new();
    for task in 0..16 {
        let (mut client, name, base) =
            (SnapshotsClient::new(channel.clone()), name.to_owned(), base.to_owned());
        tasks.spawn(async move {
            for n in (task..=count).step_by(16) {
                prepare(&mut client, &name, &format!("{base}-{n}"), "").await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

fn labels() -> HashMap<String, String> {
    // Without it the collector would take what no image refers to.
    HashMap::from([("containerd.io/gc.root".to_owned(), "bench".to_owned())])
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", tonic::metadata::MetadataValue::from_static(NAMESPACE));
    request
}

async fn prepare(client: &mut SnapshotsClient<Channel>, name: &str, key: &str, parent: &str) -> Result<()> {
    let message = snapshots::PrepareSnapshotRequest {
        snapshotter: name.into(),
        key: key.into(),
        parent: parent.into(),
        labels: labels(),
    };
    client.prepare(request(message)).await.context("Prepare")?;
    Ok(())
}

async fn mounts(client: &mut SnapshotsClient<Channel>, name: &str, key: &str) -> Result<()> {
    client
        .mounts(request(snapshots::MountsRequest { snapshotter: name.into(), key: key.into() }))
        .await
        .context("Mounts")?;
    Ok(())
}

async fn commit(client: &mut SnapshotsClient<Channel>, name: &str, committed: &str, key: &str) -> Result<()> {
    let message = snapshots::CommitSnapshotRequest {
        snapshotter: name.into(),
        name: committed.into(),
        key: key.into(),
        labels: labels(),
        parent: String::new(),
    };
    client.commit(request(message)).await.context("Commit")?;
    Ok(())
}

async fn remove(client: &mut SnapshotsClient<Channel>, name: &str, key: &str) -> Result<()> {
    client
        .remove(request(snapshots::RemoveSnapshotRequest { snapshotter: name.into(), key: key.into() }))
        .await
        .context("Remove")?;
    Ok(())
}

async fn list(client: &mut SnapshotsClient<Channel>, name: &str) -> Result<usize> {
    let message = snapshots::ListSnapshotsRequest { snapshotter: name.into(), filters: Vec::new() };
    let mut stream = client.list(request(message)).await.context("List")?.into_inner();
    let mut found = 0;
    while let Some(message) = stream.message().await? {
        found += message.info.len();
    }
    Ok(found)
}

/// One pass of containerd's collector: deleting a lease can wait for it.
async fn collect(channel: &Channel) -> Result<Duration> {
    let mut client = LeasesClient::new(channel.clone());
    let id = unique("lease");
    client.create(request(leases::CreateRequest { id: id.clone(), labels: HashMap::new() })).await?;
    let began = Instant::now();
    client.delete(request(leases::DeleteRequest { id, sync: true })).await.context("collect")?;
    Ok(began.elapsed())
}

fn unique(what: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{what}-{}", now.as_nanos())
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or_default()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn header(names: &[String], first: &str) {
    print!("| {first} |");
    names.iter().for_each(|name| print!(" {name} |"));
    names[1..].iter().for_each(|name| print!(" {name} / {} |", names[0]));
    println!("\n|---|{}", "---:|".repeat(names.len() * 2 - 1));
}

/// The ratio is the median of the rounds' own ratios: each round compares neighbours in time.
fn row(args: &Args, turns: &HashMap<&str, Vec<Turn>>, what: &str, value: impl Fn(&Turn) -> f64) {
    let values = |name: &String| -> Vec<f64> { turns[name.as_str()].iter().map(&value).collect() };
    let base = values(&args.snapshotters[0]);
    print!("| {what} |");
    args.snapshotters.iter().for_each(|name| print!(" {:.2} |", middle(values(name))));
    for name in &args.snapshotters[1..] {
        let ratios = values(name).iter().zip(&base).map(|(one, other)| one / other).collect();
        print!(" **{:.2}** |", middle(ratios));
    }
    println!();
}

fn print_row(args: &Args, what: &str, value: impl Fn(&str) -> f64) {
    let values: Vec<f64> = args.snapshotters.iter().map(|name| value(name)).collect();
    print!("| {what} |");
    values.iter().for_each(|value| print!(" {value:.1} |"));
    values[1..].iter().for_each(|value| print!(" **{:.2}** |", value / values[0]));
    println!();
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
