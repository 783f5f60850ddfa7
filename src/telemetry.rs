//! What the outside can see: logs and metrics. Their names are spelled here and nowhere else.
//!
//! Logs go to standard error: for people on a terminal, one JSON object a line otherwise. Metrics are Prometheus text, served
//! by `service` on a loopback port when one is configured.

use std::fmt;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

mod levels;
mod recent;

use levels::LevelCollector;
use recent::Recent;

pub use levels::{
    LayerLevels, Levels, PoolLevels, PublishLevels, RootLevels, StoreLevels, Timing, TraceLevels,
};
pub use recent::{Fault, recent_faults};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Human,
    /// One object a line.
    Json,
}

/// Why logs cannot be written as asked.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is not one.
    #[error(
        "log level {0:?} is not one of error, warn, info, debug, trace, or a filter such as info,speedy=debug"
    )]
    Level(String),
    /// Somebody set up logs before.
    #[error("logs are set up already")]
    Twice,
}

/// Starts logging to standard error.
pub fn init_logs(level: &str, format: LogFormat) -> Result<(), TelemetryError> {
    init_logs_through(level, format, std::io::stderr)
}

/// Starts logging to standard error through another writer to it.
pub fn init_logs_through<W>(level: &str, format: LogFormat, writer: W) -> Result<(), TelemetryError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(level).map_err(|_| TelemetryError::Level(level.to_owned()))?;
    let human = match format {
        LogFormat::Human => true,
        LogFormat::Json => false,
        LogFormat::Auto => std::io::stderr().is_terminal(),
    };
    // Where standard error is a pipe that nobody reads any more, the report of that would itself fail, and end us.
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let lines = match human {
        true => lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed(),
        false => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    // Faults are remembered even where the log is told to keep quiet about them.
    let logs = tracing_subscriber::registry().with(lines.with_filter(filter));
    let started = logs.with(Recent.with_filter(LevelFilter::WARN)).try_init();
    started.map_err(|_| TelemetryError::Twice)
}

/// The RPCs of the snapshots service, and Apply of the diff service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the RPC of its name")]
pub enum Method {
    Prepare,
    View,
    Mounts,
    Commit,
    Remove,
    Stat,
    Update,
    List,
    Usage,
    Cleanup,
    Apply,
}

impl Method {
    /// The RPC's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Prepare => "Prepare",
            Method::View => "View",
            Method::Mounts => "Mounts",
            Method::Commit => "Commit",
            Method::Remove => "Remove",
            Method::Stat => "Stat",
            Method::Update => "Update",
            Method::List => "List",
            Method::Usage => "Usage",
            Method::Cleanup => "Cleanup",
            Method::Apply => "Apply",
        }
    }
}

impl EncodeLabelValue for Method {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: Method,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallMethod {
    method: Method,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Apply {
    how: &'static str,
}

/// What is counted while serving; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    calls: Family<Call, Counter>,
    durations: Family<CallMethod, Histogram>,
    applies: Family<Apply, Counter>,
}

impl Metrics {
    /// `levels` is called whenever metrics are read.
    pub fn new(levels: impl Fn() -> Levels + Send + Sync + 'static) -> Metrics {
        let mut registry = Registry::with_prefix("speedy");
        let calls = Family::<Call, Counter>::default();
        // 50 us to 6.5 s, each bound three times the one before.
        const BOUNDS: [f64; 11] = [0.00005, 0.00015, 0.0005, 0.0015, 0.005, 0.015, 0.05, 0.15, 0.5, 1.5, 5.0];
        let durations = Family::<CallMethod, Histogram>::new_with_constructor(|| Histogram::new(BOUNDS));
        registry.register("rpc_calls", "Calls answered, by method and gRPC code", calls.clone());
        registry.register_with_unit(
            "rpc_duration",
            "Time from a call's arrival to its answer",
            Unit::Seconds,
            durations.clone(),
        );
        let applies = Family::<Apply, Counter>::default();
        registry.register("diff_applies", "Layers applied, by what they became", applies.clone());
        registry.register_collector(Box::new(LevelCollector(levels)));
        Metrics { registry: Arc::new(registry), calls, durations, applies }
    }

    /// Counts an answered call.
    pub fn rpc(&self, method: Method, code: &'static str, took: Duration) {
        self.calls.get_or_create(&Call { method, code }).inc();
        self.durations.get_or_create(&CallMethod { method }).observe(took.as_secs_f64());
    }

    /// Counts an applied layer.
    pub fn applied(&self, how: &'static str) {
        self.applies.get_or_create(&Apply { how }).inc();
    }

    /// Everything, as Prometheus text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(fmt::Error) => String::from("# EOF\n"),
        }
    }
}
