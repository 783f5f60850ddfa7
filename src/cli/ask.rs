//! `speedy status`, `layers` and `explain`: what a running daemon says.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

use super::print;
use crate::config::Effective;
use crate::containerd;
use crate::containerd::Containerd;
use crate::containerd::manifest::Platform;
use crate::proto::containerd::services::containers::v1::GetContainerRequest;
use crate::proto::containerd::services::containers::v1::containers_client::ContainersClient;
use crate::proto::speedy::v1::control_client::ControlClient;
use crate::proto::speedy::v1::{ExplainRequest, LayersRequest, Report, StatusRequest};
use crate::snapshot::report::{
    DiskCounts, LayerExplained, LayerReport, MirrorState, PoolState, StatusReport, TraceState,
};

/// How often a daemon is asked that is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// What to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Human,
    Json,
}

/// `speedy status`.
pub(super) fn status(effective: &Effective, form: Form) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(async {
        let mut daemon = daemon(&effective.config.address).await?;
        let report = daemon.status(StatusRequest {}).await;
        answer(report?.into_inner(), form, |status: &StatusReport| status_text(status))
    })
}

/// `speedy layers`; with `wait`, once none of them is being fetched any more.
pub(super) fn layers(effective: &Effective, form: Form, wait: bool) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(async {
        let mut daemon = daemon(&effective.config.address).await?;
        let bar = (wait && std::io::stderr().is_terminal()).then(progress);
        loop {
            let report = daemon.layers(LayersRequest {}).await?.into_inner();
            let layers: Vec<LayerReport> = match serde_json::from_slice(&report.json) {
                Err(error) if wait => return Err(error).context("the daemon is of another version"),
                read => read.unwrap_or_default(),
            };
            let filling = layers.iter().filter(|layer| layer.state == "filling").count();
            if wait && filling > 0 {
                if let Some(bar) = &bar {
                    let percent: u64 = layers.iter().map(|layer| u64::from(layer.percent)).sum();
                    bar.set_position(percent / layers.len() as u64);
                    bar.set_message(format!("{filling} of {} layers are being fetched", layers.len()));
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            let code = answer(report, form, |layers: &Vec<LayerReport>| layers_text(layers))?;
            let failed = layers.iter().any(|layer| layer.state == "failed");
            return Ok(if wait && failed { ExitCode::FAILURE } else { code });
        }
    })
}

fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:12} {percent:>3} %  {wide_msg}");
    ProgressBar::new(100).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// `speedy explain`.
pub(super) fn explain(
    effective: &Effective,
    namespace: &str,
    what: &str,
    form: Form,
) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(async {
        let mut daemon = daemon(&effective.config.address).await?;
        let request = resolve(&effective.config.containerd, namespace, what).await?;
        let report = daemon.explain(request).await;
        let report = report.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        answer(report.into_inner(), form, |layers: &Vec<LayerExplained>| explain_text(what, layers))
    })
}

/// What a running daemon says of itself, if one answers.
pub(super) async fn running(address: &Path) -> Option<StatusReport> {
    let report = daemon(address).await.ok()?.status(StatusRequest {}).await.ok()?;
    serde_json::from_slice(&report.into_inner().json).ok()
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn daemon(address: &Path) -> anyhow::Result<ControlClient<tonic::transport::Channel>> {
    let channel = containerd::connect(address).await.with_context(|| {
        format!(
            "no daemon answers on {}; is `speedy serve` running? (--address names another socket)",
            address.display()
        )
    })?;
    Ok(ControlClient::new(channel).max_decoding_message_size(64 << 20))
}

fn answer<T: DeserializeOwned>(
    report: Report,
    form: Form,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<ExitCode> {
    match form {
        Form::Json => {
            let value: serde_json::Value = serde_json::from_slice(&report.json)?;
            print(&format!("{value:#}\n"))?;
        }
        Form::Human => {
            let read = serde_json::from_slice(&report.json);
            print(&text(&read.context("the daemon is of another version; use --json")?))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An image's layers, or else a container's snapshot.
async fn resolve(socket: &Path, namespace: &str, what: &str) -> anyhow::Result<ExplainRequest> {
    let containerd = Containerd::open(socket, namespace).await?;
    if let Some(image) = containerd.find_image(what).await? {
        let layers = containerd.image_layers(&image, &Platform::host()).await?;
        let chains = layers.iter().map(|layer| layer.chain.to_string()).collect();
        return Ok(ExplainRequest { chains, ..ExplainRequest::default() });
    }
    let mut client = ContainersClient::new(containerd::connect(socket).await?);
    let request = containerd.request(GetContainerRequest { id: what.to_owned() });
    match client.get(request).await {
        Ok(found) => {
            let container = found.into_inner().container.unwrap_or_default();
            let (namespace, key) = (namespace.to_owned(), container.snapshot_key);
            Ok(ExplainRequest { namespace, key, ..ExplainRequest::default() })
        }
        Err(status) if status.code() == tonic::Code::NotFound => {
            bail!(
                "containerd has no image and no container {what:?} in namespace {namespace:?} (-n names another)"
            )
        }
        Err(status) => Err(status.into()),
    }
}

fn pool_text(pool: &PoolState) -> String {
    let (of, mut out) = (&pool.snapshots, String::new());
    if let Some(name) = &pool.snapshotter {
        out = format!(
            "{name}: {} committed, {} active, {} views, {} to be freed; ",
            of.committed, of.active, of.views, of.removing
        );
    }
    out += &format!("{} % of data and {} % of metadata free", pool.data_free, pool.metadata_free);
    if let Some(trouble) = &pool.trouble {
        out += &format!("; {trouble}");
    }
    out
}

fn status_text(status: &StatusReport) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        writeln!(out, "{name:<14}{value}").expect("writing to a string does not fail");
    };
    line("version", status.version.clone());
    line("root", format!("{} ({} free)", status.root, bytes(status.free_bytes)));
    let snapshots = &status.snapshots;
    line(
        "snapshots",
        format!(
            "{} committed, {} active, {} views, {} to be freed",
            snapshots.committed, snapshots.active, snapshots.views, snapshots.removing
        ),
    );
    for pool in &status.pools {
        line("pool", pool_text(pool));
    }
    line("layer images", status.layer_images.clone());
    line("lazy reads", status.lazy.clone());
    let layers = &status.layers;
    line(
        "layers",
        format!(
            "{}, {} on disk; {} being fetched, {} unused, {} attached, {} of them read lazily",
            layers.count,
            bytes(layers.bytes),
            layers.filling,
            layers.unclaimed,
            layers.attached,
            layers.lazy
        ),
    );
    line("disk", disk_text(&layers.disk));
    match &status.store {
        None => line("store", "none".into()),
        Some(store) => {
            line("store", format!("{} ({})", store.url, store.state));
            line("trust", trust_text(&store.trust, &store.keys));
        }
    }
    line("mirror", mirror_text(status.mirror.as_ref()));
    line("traces", traces_text(&status.traces));
    let publish = &status.publish;
    line(
        "publish",
        format!(
            "{}; {} pending, {} given up; {} layers and {} images published since the start, {} of {} uploaded",
            publish.policy,
            publish.pending,
            publish.dropped,
            publish.layers,
            publish.names,
            bytes(publish.uploaded),
            bytes(publish.bytes)
        ),
    );
    for problem in &publish.problems {
        let what = if problem.retried { "is tried again" } else { "was given up" };
        let subject = problem.image.as_ref().unwrap_or(&problem.chain);
        line("", format!("{subject} {what}: {}", problem.message));
    }
    out
}

fn traces_text(traces: &TraceState) -> String {
    let TraceState { policy, read, written, recording, chunks, used, expected, .. } = traces;
    format!(
        "{policy}; {read} read and {written} written since the start, {recording} starts being recorded; {chunks} chunks ({}) fetched \
         before anybody asked, of {expected} that were expected {used} were read",
        bytes(traces.bytes)
    )
}

fn disk_text(disk: &DiskCounts) -> String {
    let limit = disk.limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {}", bytes(limit)));
    format!(
        "{limit}; {} given up and {} layers demoted, {} checked, {} chunks damaged, {} repaired since the start",
        bytes(disk.given_up),
        disk.demotions,
        bytes(disk.scrubbed),
        disk.damaged,
        disk.repaired
    )
}

fn mirror_text(mirror: Option<&MirrorState>) -> String {
    let Some(MirrorState { address, served, absent, reachable, failed, malformed }) = mirror else {
        return "none; `speedy serve --registry ADDR` answers while a registry is away".to_owned();
    };
    let wrong = match (failed, malformed) {
        (0, 0) => String::new(),
        _ => format!(", {failed} failed, {malformed} were no requests"),
    };
    format!(
        "{address}: {served} served, {absent} not on the store, {reachable} left to a registry that answers{wrong}"
    )
}

fn trust_text(mode: &str, keys: &[String]) -> String {
    match mode {
        "any" => "ANY: layers of everybody who can write to the store are mounted here".into(),
        _ => format!("keys: {}", keys.join(", ")),
    }
}

fn layers_text(layers: &[LayerReport]) -> String {
    let mut out = format!(
        "{:>8}  {:<19}  {:<8}  {:<9}  {:>9}  {:>9}  {:>9}  {:>5}  {:<8}  {}\n",
        "SERIAL", "DIFF ID", "ORIGIN", "STATE", "SIZE", "FETCHED", "SHARED", "USED", "ATTACHED", "PUBLISHED"
    );
    for layer in layers {
        let state = match layer.state.as_str() {
            "filling" => format!("{} %", layer.percent),
            "cold" => format!("cold {} %", layer.percent),
            state => state.to_owned(),
        };
        writeln!(
            out,
            "{:>8}  {:<19}  {:<8}  {:<9}  {:>9}  {:>9}  {:>9}  {:>5}  {:<8}  {}",
            layer.serial,
            short(&layer.diff_id),
            layer.origin,
            state,
            bytes(layer.bytes),
            bytes(layer.fetched),
            bytes(layer.shared),
            layer.snapshots,
            layer.mounted(),
            yes(layer.published)
        )
        .expect("writing to a string does not fail");
    }
    out
}

fn explain_text(what: &str, layers: &[LayerExplained]) -> String {
    let mut out = format!("{what}: {} layers, the lowest first\n", layers.len());
    for (n, layer) in layers.iter().enumerate() {
        let chain = layer.chain.as_deref().map_or_else(|| "(no layer of an image)".to_owned(), short);
        let mut text = format!("{:>3}  {chain}  ", n + 1);
        match (&layer.image, layer.kind.as_str()) {
            (Some(image), kind) => {
                let from = match image.origin.as_str() {
                    "fetched" => format!(
                        "from the store: {} fetched, {} shared with other layers",
                        bytes(image.fetched),
                        bytes(image.shared)
                    ),
                    _ => "made here from the pulled blob".to_owned(),
                };
                let (size, how) = (bytes(image.bytes), image.mounted());
                let (state, percent) = (&image.state, image.percent);
                write!(
                    text,
                    "{kind} {}, {size}, {state}, {percent} %, attached: {how}; {from}",
                    image.serial
                )
                .expect("writing to a string does not fail");
                if image.evicted > 0 {
                    write!(text, "; {} were given up for want of room", bytes(image.evicted))
                        .expect("writing to a string does not fail");
                }
                if let Some(problem) = &image.problem {
                    write!(text, "; {problem}").expect("writing to a string does not fail");
                }
            }
            (None, "files") => text.push_str("files, unpacked into a directory"),
            (None, _) => text.push_str("not on this node"),
        }
        if let Some(remote) = &layer.remote {
            write!(text, "\n     store: {remote}").expect("writing to a string does not fail");
        }
        if let Some(trace) = &layer.trace {
            write!(text, "\n     trace: {trace}").expect("writing to a string does not fail");
        }
        if let Some(publish) = &layer.publish {
            write!(text, "\n     publishing: {publish}").expect("writing to a string does not fail");
        }
        for name in &layer.names {
            write!(text, "\n     image: {name}").expect("writing to a string does not fail");
        }
        out.push_str(&text);
        out.push('\n');
    }
    out
}

/// The first digits of a digest, enough to tell one from another.
fn short(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}

fn yes(flag: bool) -> &'static str {
    if flag { "yes" } else { "no" }
}

/// A size for people.
fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_trust_is_said_loudly() {
        assert!(trust_text("any", &[]).starts_with("ANY"));
        assert_eq!(trust_text("keys", &["a".into(), "b".into()]), "keys: a, b");
    }
}
