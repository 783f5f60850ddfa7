//! The command line: one file for each verb.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{self, Effective, Flags};
use crate::containerd::manifest::Platform;
use crate::telemetry;

mod ask;
pub mod check;
mod check_verb;
mod fetch;
mod fsck;
mod gc;
mod hosts;
mod images;
mod keeper;
mod kernel_call;
mod long;
mod publish;
mod serve;
mod show_config;
mod trust;

/// A containerd proxy snapshotter.
///
/// `speedy serve` answers containerd's snapshots API on a unix socket. containerd finds it through
/// [proxy_plugins.speedy]; `speedy check` prints the exact lines.
#[derive(Debug, Parser)]
#[command(name = "speedy", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve containerd's snapshots API, in the foreground
    ///
    /// Ready when the socket answers; tells systemd so. SIGTERM finishes the calls that have begun and exits with 0.
    Serve(Settings),
    /// Hold descriptors for the daemon, so that they outlive it, in the foreground
    ///
    /// A small process that stays while the daemon is restarted, upgraded or killed. Reads of files that the daemon serves wait
    /// meanwhile, and go on when the next daemon takes its descriptors back. When none comes for --dead-man seconds the reads
    /// fail instead of waiting for ever.
    ///
    /// Run it as a service of its own (speedy-keeper.service) or let the daemon start it. Never stop it while containers
    /// run: SIGTERM gives up what is kept. SIGUSR2 has it become the installed program, with all it holds.
    Keeper(keeper::Arguments),
    /// Look at this machine, at containerd and at the store, and print what to change
    Check {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// containerd's configuration file [default: the running containerd's, else /etc/containerd/config.toml]
        #[arg(long, value_name = "FILE")]
        containerd_config: Option<PathBuf>,
    },
    /// Upload an image's layers to the store, so that other nodes start it from there
    ///
    /// Takes the image from containerd, from an OCI image layout or from an archive of `docker save`; works without the daemon.
    /// Returns when everything is durable. What the store has already is not uploaded again.
    Publish(publish::Arguments),
    /// Fetch an image's blobs from its registry into containerd's content store
    ///
    /// An image that was started from the store has none of its layers' blobs: what copies the image (push, save, convert, another
    /// snapshotter) misses them. This has containerd fetch what it lacks, with its own configuration of registries; the image, its
    /// snapshots and its containers stay as they are. For example:
    ///
    ///     speedy fetch --namespace k8s.io registry.example/app:1
    #[command(verbatim_doc_comment)]
    Fetch(fetch::Arguments),
    /// Delete from the store what no image needs
    ///
    /// Images are what names in the store say; the rules `gc.keep` of the configuration say which names go. Says what would be deleted;
    /// deletes with --execute, after reading names and refs a second time, and only what is older than the grace period. Safe beside
    /// nodes that publish and pull, and beside other collections. Run it again if it was interrupted.
    ///
    /// The chunks of a layer are kept for one more grace period after its ref went, for nodes that have just begun to fetch it.
    Gc(gc::Arguments),
    /// List the images in the store: their bytes, what they share, when they were used, whether they are complete
    Images(images::Arguments),
    /// Look for everything on the store, and of this node's layer images, that is missing or damaged
    ///
    /// Reads every object (--quick: only asks for it), names what is wrong and which layers and images it touches. --repair brings back what this
    /// node or its containerd has; run it on several nodes if one does not have everything. May run at any time, beside daemons,
    /// publishers and collections.
    ///
    /// Exits with 0 if everything is sound (or was repaired), with 1 if something is missing or damaged, and with 2 if that cannot be
    /// told: the store does not answer or refuses, or a newer Speedy wrote to it.
    Fsck(fsck::Arguments),
    /// Print this node's public key, and the line that another node needs to use what this one publishes
    Trust {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the effective configuration and where each value came from
    #[command(args_conflicts_with_subcommands = true)]
    Config {
        #[command(subcommand)]
        what: Option<ConfigVerb>,
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the state of the running daemon: snapshots, layers, the store, what is being published
    ///
    /// Asks the daemon on --address (environment SPEEDY_ADDRESS).
    Status {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the layer images of this node: where each came from, how much of it is here, who uses it
    Layers {
        #[command(flatten)]
        settings: Settings,
        /// Return when all of them are on the disk, with 1 if one cannot be fetched
        #[arg(long)]
        wait: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where the layers of an image or of a container came from, and why they were not taken from the store
    Explain {
        #[command(flatten)]
        settings: Settings,
        /// containerd's namespace [environment: CONTAINERD_NAMESPACE]
        #[arg(long, short, value_name = "NS")]
        namespace: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// An image or a container, as containerd calls it
        #[arg(value_name = "IMAGE|CONTAINER")]
        what: String,
    },
    /// Make a system call that may wait for the daemon; only the daemon starts this
    #[command(hide = true)]
    KernelCall(kernel_call::Arguments),
    /// Print a completion script for a shell
    ///
    /// For example: speedy completion bash > /etc/bash_completion.d/speedy
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    ///
    /// For example: speedy man > /usr/local/share/man/man8/speedy.8
    Man,
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Print the hosts.toml with which containerd starts a registry's images while the registry cannot be reached
    ///
    /// The registry itself is asked first; only while it does not answer, or answers that it has failed, this node's `registry`
    /// port gives what the store knows. For example:
    ///
    ///     speedy config hosts docker.io > /etc/containerd/certs.d/docker.io/hosts.toml
    #[command(verbatim_doc_comment)]
    Hosts {
        #[command(flatten)]
        settings: Settings,
        /// The registry, as references begin with it: docker.io, registry.example:5000
        #[arg(value_name = "REGISTRY")]
        name: String,
        /// It speaks HTTP without TLS; those on this machine are taken to do so
        #[arg(long)]
        plain_http: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Settings that every verb understands. Each has its key in the configuration file and its environment variable; flags win
/// over the environment, that over the file, that over the defaults (see `speedy config`).
#[derive(Debug, Default, Args)]
struct Settings {
    /// The unix socket that containerd talks to [key: address; default: /run/speedy/speedy.sock]
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Where snapshots and their records live [key: root; default: /var/lib/speedy]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// containerd's own socket; may be absent [key: containerd; default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// The configuration file [default: /etc/speedy/speedy.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// error, warn, info, debug or trace [key: log.level; default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Where layers come from and go to: file:///DIR, s3://BUCKET/PREFIX [key: store; default: none]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Serve a status page and Prometheus metrics on this loopback address, such as 127.0.0.1:9890 [key: metrics; default: none]
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
    /// Answer for registries that cannot be reached on this loopback address, such as 127.0.0.1:5051, to any local process
    /// [key: registry; default: none]
    #[arg(long, value_name = "ADDR")]
    registry: Option<String>,
    /// Whose layers are taken from the store: keys or any [key: trust.mode; default: keys]
    #[arg(long, value_name = "WHO")]
    trust: Option<String>,
}

impl Settings {
    fn load(self) -> anyhow::Result<Effective> {
        load(&self.flags())
    }

    fn flags(self) -> Flags {
        Flags {
            config: self.config,
            root: self.root,
            address: self.address,
            keeper: None,
            containerd: self.containerd,
            log_level: self.log_level,
            store: self.store,
            metrics: self.metrics,
            registry: self.registry,
            trust: self.trust,
        }
    }
}

fn load(flags: &Flags) -> anyhow::Result<Effective> {
    let effective = config::load(flags, config::environment())?;
    effective.unknown_variables.iter().for_each(warn);
    Ok(effective)
}

/// Parses the arguments, runs the verb, says what went wrong.
pub fn run() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Serve(settings) => settings.load().and_then(|effective| serve::run(&effective)),
        Verb::Keeper(arguments) => keeper::run(arguments),
        Verb::Check { settings, json, containerd_config } => settings
            .load()
            .and_then(|effective| check_verb::run(&effective, containerd_config.as_deref(), json)),
        Verb::Publish(mut arguments) => {
            arguments.take_settings().load().and_then(|effective| publish::run(&effective, &arguments))
        }
        Verb::Fetch(mut arguments) => {
            arguments.take_settings().load().and_then(|effective| fetch::run(&effective, &arguments))
        }
        Verb::Gc(mut arguments) => {
            arguments.take_settings().load().and_then(|effective| gc::run(&effective, &arguments))
        }
        Verb::Images(mut arguments) => {
            arguments.take_settings().load().and_then(|effective| images::run(&effective, arguments))
        }
        Verb::Fsck(arguments) => fsck::run(arguments),
        Verb::Trust { settings, json } => settings.load().and_then(|effective| trust::run(&effective, json)),
        Verb::Config { what: Some(ConfigVerb::Hosts { settings, name, plain_http, json }), .. } => {
            settings.load().and_then(|effective| hosts::run(&effective, &name, plain_http, json))
        }
        Verb::Config { what: None, settings, json } => {
            settings.load().and_then(|effective| show_config::run(&effective, json))
        }
        Verb::Status { settings, json } => {
            settings.load().and_then(|effective| ask::status(&effective, form(json)))
        }
        Verb::Layers { settings, wait, json } => {
            settings.load().and_then(|effective| ask::layers(&effective, form(json), wait))
        }
        Verb::Explain { settings, namespace, json, what } => settings.load().and_then(|effective| {
            ask::explain(&effective, &namespace_or_default(namespace), &what, form(json))
        }),
        Verb::KernelCall(arguments) => Ok(kernel_call::run(&arguments)),
        Verb::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "speedy", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Man => print_man(),
    };
    match done {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the one place where errors are printed")]
            {
                eprintln!("speedy: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn log_format(format: config::LogFormat) -> telemetry::LogFormat {
    match format {
        config::LogFormat::Auto => telemetry::LogFormat::Auto,
        config::LogFormat::Human => telemetry::LogFormat::Human,
        config::LogFormat::Json => telemetry::LogFormat::Json,
    }
}

fn form(json: bool) -> ask::Form {
    if json { ask::Form::Json } else { ask::Form::Human }
}

/// containerd's namespace: as given, else as its own tools take it from the environment.
fn namespace_or_default(given: Option<String>) -> String {
    let from_environment = || std::env::var("CONTAINERD_NAMESPACE").ok().filter(|name| !name.is_empty());
    given.or_else(from_environment).unwrap_or_else(|| "default".to_owned())
}

/// The platform of an image: as given, else this machine's.
fn platform_or_host(given: Option<&str>) -> anyhow::Result<Platform> {
    Ok(given.map(Platform::parse).transpose()?.unwrap_or_else(Platform::host))
}

fn print(text: &str) -> std::io::Result<()> {
    use std::io::Write;
    std::io::stdout().write_all(text.as_bytes())
}

fn print_man() -> anyhow::Result<ExitCode> {
    use std::io::Write;
    let mut page = Vec::new();
    let command = Cli::command();
    clap_mangen::Man::new(command.clone()).section("8").render(&mut page)?;
    for verb in command.get_subcommands() {
        let title = format!("speedy {}", verb.get_name());
        let below = verb.get_subcommands().map(|verb| (format!("{title} {}", verb.get_name()), verb));
        let verbs = std::iter::once((title.clone(), verb)).chain(below);
        for (title, verb) in verbs.filter(|(_, verb)| verb.get_name() != "help") {
            let man = clap_mangen::Man::new(verb.clone().name(title)).section("8");
            man.render_description_section(&mut page)?;
            man.render_synopsis_section(&mut page)?;
            man.render_options_section(&mut page)?;
        }
    }
    std::io::stdout().write_all(&page)?;
    Ok(ExitCode::SUCCESS)
}

/// Whoever read our output has seen enough (`speedy config | head -1`): no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Before logs exist, and for verbs without logs. Where nobody reads standard error, that is no reason to end.
fn warn(problem: &impl std::fmt::Display) {
    use std::io::Write;
    writeln!(std::io::stderr(), "speedy: warning: {problem}").unwrap_or_default();
}
