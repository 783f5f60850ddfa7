//! The keeper itself: one thread that waits, answers, and otherwise does nothing.
//!
//! **Where.** `speedy keeper` runs [`run`]; everything comes in through one `poll`: signals, new connections, requests, the
//! clock. Nothing here waits for a peer: a message is there whole or not at all, and an answer that finds no room ends its
//! connection.
//!
//! **Words.** A *guest* is a connection that has not said hello. There are a few at most; the oldest makes room for the newest.
//!
//! **When it fails.** [`ProcessError`] before it serves. Later only if `poll` itself fails, which ends it as a kill would;
//! see the module above for what that means.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::circular::{self, Circular};
use super::handover::{self, Handover, Taken};
use super::held::{DeadMan, Held};
use super::protocol::{
    Answer, LONGEST_MESSAGE, MOST_HELD, Name, Refusal, Request, VERSION, decode_request, encode_answer,
};
use crate::sys::fdpass::{self, Channel, PassError, PassListener};
use crate::sys::fusectl::{self, Aborted};
use crate::sys::program;
use crate::sys::signals::{Signal, Signals};
use crate::sys::socket::SocketError;
use crate::sys::{limits, memory};

/// How many connections may wait without a hello.
const MOST_GUESTS: usize = 8;
/// How long to leave the listener alone when a connection could not be accepted.
const REST: Duration = Duration::from_millis(100);

/// How a keeper is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// The dead-man time, until an owner says another.
    pub dead_man: Duration,
    /// Whether it ends when it holds nothing and nobody is connected.
    pub stay: Stay,
    /// The number of the memory file that a predecessor left.
    pub adopt: Option<RawFd>,
    /// The arguments that this process was started with, for the program that it becomes in an upgrade.
    pub arguments: Vec<OsString>,
}

/// How long a keeper is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    /// Until it is told to end.
    Always,
    /// Until nobody needs it.
    WhileNeeded,
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It may be served by the daemon that needs it.
    #[error(transparent)]
    Circular(#[from] Circular),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The predecessor's state cannot be used; what it held is lost.
    #[error("cannot take over from the keeper before: {0}")]
    Handover(#[source] io::Error),
    /// The system refused.
    #[error("the keeper cannot run: {0}")]
    Io(#[from] io::Error),
}

/// Whether this program, as it is installed, could take over from a keeper that writes this version of a handover.
pub fn understands(version: u32) -> bool {
    version == handover::VERSION && matches!(circular::refuse(&[]), Ok(Ok(())))
}

/// Keeps what it is given, until SIGTERM or, if so asked, until nobody needs it.
pub fn run(options: Options) -> Result<(), ProcessError> {
    // What is already held must not be lost over it.
    if options.adopt.is_none() {
        circular::refuse(&[("the keeper's socket", &options.socket)])??;
    }
    limits::raise_open_files();
    let signals = Signals::take()?;
    let mut keeper = match options.adopt {
        None => Keeper::fresh(options)?,
        Some(memory) => Keeper::adopted(options, memory).map_err(ProcessError::Handover)?,
    };
    memory::lock_all();
    tracing::info!(socket = %keeper.listener.path().display(), held = keeper.held.len(), "keeping");
    notify(sd_notify::NotifyState::Ready);
    let served = keeper.serve(&signals);
    notify(sd_notify::NotifyState::Stopping);
    keeper.listener.unlink();
    Ok(served?)
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd");
    }
}

#[derive(Debug)]
struct Connection {
    /// Never used again for another connection.
    serial: u64,
    channel: Channel,
    /// Whether a bad message of it was logged: one line each is enough for whoever floods.
    blamed: bool,
}

/// What is ready after a wait.
#[derive(Debug)]
struct Ready {
    signals: bool,
    listener: bool,
    connections: Vec<u64>,
}

#[derive(Debug)]
struct Keeper {
    /// Where the program is found in an upgrade.
    program: io::Result<PathBuf>,
    arguments: Vec<OsString>,
    stay: Stay,
    listener: PassListener,
    connections: Vec<Connection>,
    next_serial: u64,
    owner: Option<u64>,
    held: Held,
    dead_man: DeadMan,
    buffer: Vec<u8>,
    /// Until then nothing is accepted.
    rest: Option<Instant>,
}

impl Keeper {
    fn fresh(options: Options) -> Result<Keeper, SocketError> {
        let listener = PassListener::bind(&options.socket)?;
        let mut keeper = Keeper::with(options, listener);
        if keeper.stay == Stay::WhileNeeded {
            // Whoever started it may have died before it said hello.
            keeper.dead_man.start(Instant::now());
        }
        Ok(keeper)
    }

    fn with(options: Options, listener: PassListener) -> Keeper {
        Keeper {
            program: program::path(),
            arguments: options.arguments,
            stay: options.stay,
            listener,
            connections: Vec::new(),
            next_serial: 0,
            owner: None,
            held: Held::default(),
            dead_man: DeadMan::new(options.dead_man),
            buffer: vec![0; LONGEST_MESSAGE],
            rest: None,
        }
    }

    /// Goes on where a predecessor, which was this very process, stopped.
    fn adopted(options: Options, memory: RawFd) -> io::Result<Keeper> {
        let left = Handover::read(memory)?;
        let mut taken = Taken::default();
        let listener = PassListener::adopt(taken.take(left.listener)?, left.socket, left.inode);
        let mut keeper = Keeper::with(options, listener);
        for (name, number) in left.held {
            keeper.held.put(name, taken.take(number)?);
        }
        let mut asker = None;
        for number in left.connections {
            let serial = keeper.add(Channel::adopt(taken.take(number)?)?);
            if left.owner == Some(number) {
                keeper.owner = Some(serial);
            }
            if left.asker == Some(number) {
                asker = Some(serial);
            }
        }
        keeper.dead_man.limit = Duration::from_millis(left.dead_man_ms);
        keeper.dead_man.connection = left.connection;
        if let Some(left) = left.left_ms {
            keeper.dead_man.resume(Instant::now(), Duration::from_millis(left));
        }
        tracing::info!(held = keeper.held.len(), "upgraded: this is the installed program now");
        if let Some(serial) = asker {
            keeper.reply(serial, &keeper.greeting(), None);
        }
        Ok(keeper)
    }

    fn serve(&mut self, signals: &Signals) -> io::Result<()> {
        loop {
            let ready = self.wait(signals)?;
            if ready.signals {
                while let Some(signal) = signals.next()? {
                    match signal {
                        Signal::Terminate => {
                            self.give_up("told to end");
                            tracing::info!("ending");
                            return Ok(());
                        }
                        Signal::Upgrade => drop(self.upgrade(None)),
                    }
                }
            }
            for serial in ready.connections {
                self.listen_to(serial);
            }
            if ready.listener {
                self.accept();
            }
            if self.dead_man.is_over(Instant::now()) {
                self.dead_man.stop();
                self.give_up("no daemon came back in time");
                if self.stay == Stay::WhileNeeded && self.connections.is_empty() {
                    return Ok(());
                }
            }
            if self.is_needless() {
                tracing::info!("nothing is held and nobody is connected: ending");
                return Ok(());
            }
        }
    }

    /// Nobody is there, nothing is held, and no clock runs for somebody who may come.
    fn is_needless(&self) -> bool {
        self.stay == Stay::WhileNeeded
            && self.connections.is_empty()
            && self.held.is_empty()
            && self.dead_man.left(Instant::now()).is_none()
    }

    fn wait(&mut self, signals: &Signals) -> io::Result<Ready> {
        let now = Instant::now();
        let rest = self.rest.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero());
        if rest.is_none() {
            self.rest = None;
        }
        let limit = self.dead_man.left(now).into_iter().chain(rest).min();
        let mut waiting: Vec<BorrowedFd<'_>> = vec![signals.as_fd()];
        waiting.extend(self.connections.iter().map(|connection| connection.channel.as_fd()));
        if self.rest.is_none() {
            waiting.push(self.listener.as_fd());
        }
        let ready = fdpass::wait(&waiting, limit)?;
        let serials = self.connections.iter().map(|connection| connection.serial);
        let connections = serials.zip(&ready[1..]).filter(|(_, ready)| **ready).map(|(serial, _)| serial);
        Ok(Ready {
            signals: ready[0],
            listener: ready.get(self.connections.len() + 1).copied().unwrap_or(false),
            connections: connections.collect(),
        })
    }

    fn accept(&mut self) {
        // Not all that may wait: whoever floods must not keep the others from being heard.
        for _ in 0..MOST_GUESTS {
            match self.listener.accept() {
                Ok(None) => return,
                Ok(Some(channel)) => match channel.peer() {
                    Ok(peer) if peer.is_trusted() => self.welcome(channel),
                    Ok(peer) => tracing::warn!(?peer, "a connection of another user was refused"),
                    Err(error) => tracing::warn!(%error, "a connection whose user is unknown was refused"),
                },
                Err(error) => {
                    // Out of descriptors or memory: it would be ready again at once.
                    tracing::warn!(%error, "cannot accept a connection");
                    self.rest = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, channel: Channel) {
        let guests = self.connections.iter().filter(|connection| Some(connection.serial) != self.owner);
        let serials: Vec<u64> = guests.map(|guest| guest.serial).collect();
        if serials.len() >= MOST_GUESTS {
            self.close(serials[0]);
        }
        // Its hello is mostly there already, and counts before the next guest's arrival can cost it its place.
        let serial = self.add(channel);
        self.listen_to(serial);
    }

    fn add(&mut self, channel: Channel) -> u64 {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.connections.push(Connection { serial, channel, blamed: false });
        serial
    }

    fn listen_to(&mut self, serial: u64) {
        // A connection that was ready may have been closed since, for another's sake.
        let Some(at) = self.connections.iter().position(|connection| connection.serial == serial) else {
            return;
        };
        let connection = &mut self.connections[at];
        let problem = match connection.channel.receive(&mut self.buffer) {
            Ok((length, descriptors)) => match decode_request(&self.buffer[..length], descriptors.len()) {
                Ok(request) => return self.obey(serial, request, descriptors),
                Err(problem) => problem.to_string(),
            },
            Err(PassError::Nothing) => return,
            Err(PassError::Closed | PassError::Io(_)) => return self.close(serial),
            Err(problem @ (PassError::TooLong(_) | PassError::TooManyDescriptors)) => problem.to_string(),
        };
        let refused = Answer::refused(Refusal::BadRequest, &problem);
        if !std::mem::replace(&mut connection.blamed, true) {
            tracing::warn!(answer = ?refused, "a message was refused");
        }
        self.reply(serial, &refused, None);
    }

    fn obey(&mut self, serial: u64, request: Request, descriptors: Vec<OwnedFd>) {
        let needs_owner = !matches!(request, Request::Hello { .. } | Request::Upgrade);
        if needs_owner && self.owner != Some(serial) {
            let refused = Answer::refused(Refusal::NotOwner, &"say hello first");
            return self.reply(serial, &refused, None);
        }
        let answer = match request {
            Request::Hello { version, .. } if version != VERSION => Answer::OtherVersion { version: VERSION },
            Request::Hello { pid, .. } => self.own(serial, pid),
            Request::Put { name } => self.put(name, descriptors),
            Request::Get { name } => match self.held.get(&name).map(OwnedFd::try_clone) {
                Some(Ok(copy)) => return self.reply(serial, &Answer::Found, Some(copy)),
                Some(Err(error)) => Answer::refused(Refusal::Full, &error),
                None => Answer::Missing,
            },
            Request::Remove { name } => match self.held.remove(&name) {
                true => Answer::Done,
                false => Answer::Missing,
            },
            Request::List { after } => {
                let (names, more) = self.held.names_after(after.as_ref());
                Answer::Names { names, more }
            }
            Request::DeadMan { seconds, connection } => {
                self.dead_man.limit = Duration::from_secs(seconds);
                self.dead_man.connection = connection;
                Answer::Done
            }
            Request::Release => {
                self.dead_man.connection = None;
                let held = self.held.clear();
                tracing::info!(held, "released: nothing depends on what was held");
                Answer::Done
            }
            Request::Upgrade => Answer::refused(Refusal::UpgradeFailed, &self.upgrade(Some(serial))),
        };
        self.reply(serial, &answer, None);
    }

    fn own(&mut self, serial: u64, pid: u32) -> Answer {
        let before = self.owner.replace(serial).filter(|before| *before != serial);
        if let Some(before) = before {
            tracing::info!("a new daemon takes over; the connection of the one before is closed");
            self.close(before);
        }
        self.dead_man.stop();
        tracing::info!(daemon = pid, held = self.held.len(), "a daemon is connected");
        self.greeting()
    }

    fn greeting(&self) -> Answer {
        Answer::Welcome { version: VERSION, pid: std::process::id(), held: self.held.len() }
    }

    fn put(&mut self, name: Name, descriptors: Vec<OwnedFd>) -> Answer {
        let Some(descriptor) = descriptors.into_iter().next() else {
            return Answer::refused(Refusal::BadRequest, &"no descriptor");
        };
        match self.held.put(name, descriptor) {
            true => Answer::Done,
            false => Answer::refused(Refusal::Full, &format!("{MOST_HELD} descriptors are held")),
        }
    }

    fn reply(&mut self, serial: u64, answer: &Answer, descriptor: Option<OwnedFd>) {
        let Some(connection) = self.connections.iter().find(|connection| connection.serial == serial) else {
            return;
        };
        let sent = encode_answer(answer).map_err(io::Error::other).and_then(|bytes| {
            let descriptors: Vec<BorrowedFd<'_>> = descriptor.iter().map(AsFd::as_fd).collect();
            connection.channel.send(&bytes, &descriptors)
        });
        // Who does not read its answers gets no others.
        if let Err(error) = sent {
            tracing::debug!(%error, "an answer was not taken");
            self.close(serial);
        }
    }

    fn close(&mut self, serial: u64) {
        self.connections.retain(|connection| connection.serial != serial);
        if self.owner == Some(serial) {
            self.owner = None;
            if self.held.is_empty() {
                tracing::info!("the daemon is gone; nothing was held");
            } else {
                self.dead_man.start(Instant::now());
                tracing::warn!(
                    held = self.held.len(), within = ?self.dead_man.limit,
                    "the daemon is gone; what it left is kept for the next one"
                );
            }
        }
    }

    /// Ends what cannot be served any more, so that nobody waits for it.
    fn give_up(&mut self, why: &str) {
        if self.held.is_empty() {
            return;
        }
        let connection = self.dead_man.connection.take();
        let aborted = connection.map(|number| abort(Path::new(fusectl::CONNECTIONS), number));
        let held = self.held.clear();
        tracing::error!(
            why,
            connection,
            ?aborted,
            dropped = held,
            "gave up what was kept: files of layers that are not wholly on this node give I/O errors (EIO) until their \
             containers are started again"
        );
    }

    /// Becomes the installed program; returns only what went wrong, and everything is as before then.
    fn upgrade(&self, asker: Option<u64>) -> io::Error {
        let error = match self.prepare(asker) {
            Ok((program, memory)) => self.become_it(&program, &memory),
            Err(error) => error,
        };
        tracing::error!(%error, "the upgrade failed; this keeper goes on");
        error
    }

    /// The installed program, which said that it will understand, and what it is to understand.
    fn prepare(&self, asker: Option<u64>) -> io::Result<(PathBuf, File)> {
        let program = match &self.program {
            Ok(program) => program.clone(),
            Err(error) => {
                return Err(io::Error::other(format!("where this program is, is unknown: {error}")));
            }
        };
        handover::ask(&program, &self.arguments)?;
        let memory = memory::file("speedy-keeper", &serde_json::to_vec(&self.handover(asker))?)?;
        Ok((program, memory))
    }

    fn become_it(&self, program: &Path, memory: &File) -> io::Error {
        let arguments = handover::arguments(&self.arguments, memory.as_raw_fd());
        let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        tracing::info!(program = %program.display(), held = self.held.len(), "upgrading");
        let all: Vec<BorrowedFd<'_>> = self.descriptors().chain([memory.as_fd()]).collect();
        let error = match all.iter().try_for_each(|one| fdpass::set_inherited(*one, true)) {
            Ok(()) => program::become_program(program, &arguments),
            Err(error) => error,
        };
        for one in all {
            if let Err(error) = fdpass::set_inherited(one, false) {
                tracing::warn!(%error, "a descriptor stays open on exec");
            }
        }
        error
    }

    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let connections = self.connections.iter().map(|connection| connection.channel.as_fd());
        let held = self.held.iter().map(|(_, descriptor)| descriptor.as_fd());
        connections.chain(held).chain([self.listener.as_fd()])
    }

    fn handover(&self, asker: Option<u64>) -> Handover {
        let number = |serial: Option<u64>| {
            let found = self.connections.iter().find(|connection| Some(connection.serial) == serial);
            found.map(|connection| connection.channel.as_fd().as_raw_fd())
        };
        let held = self.held.iter().map(|(name, descriptor)| (name.clone(), descriptor.as_raw_fd()));
        Handover {
            version: handover::VERSION,
            socket: self.listener.path().to_owned(),
            inode: self.listener.inode(),
            listener: self.listener.as_fd().as_raw_fd(),
            connections: self.connections.iter().map(|one| one.channel.as_fd().as_raw_fd()).collect(),
            owner: number(self.owner),
            asker: number(asker),
            held: held.collect(),
            dead_man_ms: milliseconds(self.dead_man.limit),
            left_ms: self.dead_man.left(Instant::now()).map(milliseconds),
            connection: self.dead_man.connection,
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Aborts a FUSE connection; what came of it, for the log.
fn abort(connections: &Path, number: u32) -> &'static str {
    if let Err(error) = fusectl::mount_list(connections) {
        tracing::warn!(%error, "cannot mount the list of FUSE connections; trying without");
    }
    match fusectl::abort(connections, number) {
        Ok(Aborted::Yes) => "aborted",
        Ok(Aborted::NoSuchConnection) => "not there; closing its descriptors ends it",
        Err(error) => {
            tracing::error!(%error, number, "cannot abort the FUSE connection; closing its descriptors may end it");
            "failed"
        }
    }
}
