//! The command line: one file for each verb.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{self, Effective, Flags};
use crate::telemetry;

mod ask;
pub mod check;
mod check_verb;
mod keeper;
mod kernel_call;
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
    /// Print this node's public key, and the line that another node needs to use what this one publishes
    Trust {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the effective configuration and where each value came from
    Config {
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
    /// Serve Prometheus metrics on this loopback address, such as 127.0.0.1:9890 [key: metrics; default: none]
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
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
        Verb::Trust { settings, json } => settings.load().and_then(|effective| trust::run(&effective, json)),
        Verb::Config { settings, json } => {
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

fn print(text: &str) -> std::io::Result<()> {
    use std::io::Write;
    std::io::stdout().write_all(text.as_bytes())
}

fn print_man() -> anyhow::Result<ExitCode> {
    use std::io::Write;
    let mut page = Vec::new();
    let command = Cli::command();
    clap_mangen::Man::new(command.clone()).section("8").render(&mut page)?;
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        let title = format!("speedy {}", verb.get_name());
        let man = clap_mangen::Man::new(verb.clone().name(title)).section("8");
        man.render_description_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_options_section(&mut page)?;
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
