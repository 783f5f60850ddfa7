//! The daemon's side: a connection to the keeper.
//!
//! **Where.** Whoever wants descriptors to outlive the process. Every call blocks, for [`LIMIT`] at most; from the async
//! side they go through [`crate::sys::blocking()`].
//!
//! **Invariants.** Only a keeper of this user or of root is talked to. After a call that did not get its answer in time the
//! connection is not used again: a late answer would be taken for the next one's.
//!
//! **When it fails.** [`KeeperError::Lost`] means that the keeper died or that another daemon took over: what was kept is to
//! be left with a new one ([`Keeper::connect_or_start`]). Until then nothing is broken, only unprotected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::protocol::{
    Answer, LONGEST_MESSAGE, Name, ProtocolError, Refusal, Request, VERSION, decode_answer, encode_request,
};
use crate::sys::fdpass::{Channel, PassError, Waiting};
use crate::sys::program;

/// How long one call may take.
pub const LIMIT: Duration = Duration::from_secs(5);
/// An upgrade first tries the installed program.
const UPGRADE_LIMIT: Duration = Duration::from_secs(10);
/// How often to look for a keeper that was just started.
const LOOK: Duration = Duration::from_millis(5);
/// How long a keeper that hung up may take to be dead.
const DEATH: Duration = Duration::from_millis(200);

/// Why the keeper did not do it.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Nobody answers there.
    #[error("no keeper answers on {socket}: {source}")]
    Absent {
        /// Where.
        socket: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The keeper is of another user, who could take what is left with it.
    #[error("{socket} is served by user {uid}, who is neither this one nor root")]
    Untrusted {
        /// Where.
        socket: PathBuf,
        /// The user.
        uid: u32,
    },
    /// The connection is gone: the keeper died, or another daemon took over.
    #[error("the connection to the keeper is lost")]
    Lost,
    /// No answer in time.
    #[error("the keeper did not answer in time")]
    TimedOut,
    /// It must be upgraded before it can be used ([`Keeper::replace`]).
    #[error("the keeper speaks version {keeper} of the protocol, this is {VERSION}: `systemctl reload` it")]
    OtherVersion {
        /// What it speaks.
        keeper: u32,
    },
    /// It said no.
    #[error("the keeper refused: {detail}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// In its words.
        detail: String,
    },
    /// What it said makes no sense.
    #[error("the keeper's answer makes no sense: {0}")]
    Protocol(#[from] ProtocolError),
    /// It answered something else than was asked.
    #[error("the keeper's answer does not belong to the question")]
    WrongAnswer,
    /// A keeper was started and is not there.
    #[error("the keeper that was started on {socket} does not answer: {}", ending(*status))]
    NotStarted {
        /// Where it should be.
        socket: PathBuf,
        /// How it ended; `None` if it runs.
        status: Option<ExitStatus>,
    },
    /// The system refused.
    #[error("cannot talk to the keeper: {0}")]
    Io(#[from] io::Error),
}

fn ending(status: Option<ExitStatus>) -> String {
    match status {
        Some(status) => format!("it ended ({status}); its reason is on standard error"),
        None => "it still runs".to_owned(),
    }
}

/// A connection to the keeper, as its owner.
#[derive(Debug)]
pub struct Keeper {
    channel: Channel,
    /// One exchange at a time.
    state: Mutex<State>,
    /// The process, if it was started here: it is reaped here, too.
    child: Mutex<Option<Child>>,
    pid: u32,
    held: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    InStep,
    /// An answer is missing, so that none can be told from another.
    Broken,
}

impl Keeper {
    /// Becomes the owner of what the keeper at `socket` holds, whoever was it before.
    pub fn connect(socket: &Path) -> Result<Keeper, KeeperError> {
        let channel = channel_to(socket)?;
        let hello = Request::Hello { version: VERSION, pid: std::process::id() };
        match exchange(&channel, &hello, None)?.0 {
            Answer::Welcome { version: VERSION, pid, held } => {
                Ok(Keeper { channel, state: Mutex::new(State::InStep), child: Mutex::new(None), pid, held })
            }
            Answer::Welcome { version, .. } | Answer::OtherVersion { version } => {
                Err(KeeperError::OtherVersion { keeper: version })
            }
            other => Err(unexpected(other)),
        }
    }

    /// As [`Keeper::connect`]; where nobody answers, starts `exe keeper` first, which outlives this process. A keeper of
    /// another version is told to become the installed program.
    pub fn connect_or_start(socket: &Path, exe: &Path) -> Result<Keeper, KeeperError> {
        match Keeper::connect(socket) {
            Err(KeeperError::Absent { .. } | KeeperError::Lost) => start(socket, exe),
            Err(KeeperError::OtherVersion { .. }) => {
                Keeper::replace(socket)?;
                Keeper::connect(socket)
            }
            done => done,
        }
    }

    /// Has the keeper at `socket` become the program that is installed now, whatever version it speaks; the new one's version.
    pub fn replace(socket: &Path) -> Result<u32, KeeperError> {
        let channel = channel_to(socket)?;
        channel.set_waiting(Waiting::UpTo(UPGRADE_LIMIT))?;
        match exchange(&channel, &Request::Upgrade, None)?.0 {
            Answer::Welcome { version, .. } => Ok(version),
            other => Err(unexpected(other)),
        }
    }

    /// Leaves a copy of a descriptor, in place of one of the same name.
    pub fn put(&self, name: &Name, descriptor: BorrowedFd<'_>) -> Result<(), KeeperError> {
        done(self.ask(&Request::Put { name: name.clone() }, Some(descriptor))?.0)
    }

    /// A descriptor of the same open file as the one that was left; `None` if there is none.
    pub fn get(&self, name: &Name) -> Result<Option<OwnedFd>, KeeperError> {
        match self.ask(&Request::Get { name: name.clone() }, None)? {
            (Answer::Found, Some(descriptor)) => Ok(Some(descriptor)),
            (Answer::Missing, _) => Ok(None),
            (other, _) => Err(unexpected(other)),
        }
    }

    /// Drops the keeper's descriptor; whether there was one.
    pub fn remove(&self, name: &Name) -> Result<bool, KeeperError> {
        match self.ask(&Request::Remove { name: name.clone() }, None)?.0 {
            Answer::Done => Ok(true),
            Answer::Missing => Ok(false),
            other => Err(unexpected(other)),
        }
    }

    /// The names of all that is held, in order.
    pub fn list(&self) -> Result<Vec<Name>, KeeperError> {
        let mut all: Vec<Name> = Vec::new();
        loop {
            match self.ask(&Request::List { after: all.last().cloned() }, None)?.0 {
                Answer::Names { names, more } => {
                    let last = names.is_empty() || !more;
                    all.extend(names);
                    if last {
                        return Ok(all);
                    }
                }
                other => return Err(unexpected(other)),
            }
        }
    }

    /// Says what is to happen when this process ends and no other comes: how long to wait (whole seconds, from 1 to a day),
    /// and which FUSE connection to abort then.
    pub fn dead_man(&self, limit: Duration, connection: Option<u32>) -> Result<(), KeeperError> {
        done(self.ask(&Request::DeadMan { seconds: limit.as_secs(), connection }, None)?.0)
    }

    /// Nothing depends on what is held any more: drops everything.
    pub fn release(&self) -> Result<(), KeeperError> {
        done(self.ask(&Request::Release, None)?.0)
    }

    /// Has the keeper become the program that is installed now. It goes on holding everything, for this owner.
    pub fn upgrade(&self) -> Result<(), KeeperError> {
        self.channel.set_waiting(Waiting::UpTo(UPGRADE_LIMIT))?;
        let answer = self.ask(&Request::Upgrade, None);
        self.channel.set_waiting(Waiting::UpTo(LIMIT))?;
        match answer?.0 {
            Answer::Welcome { version: VERSION, .. } => Ok(()),
            Answer::Welcome { version, .. } => Err(KeeperError::OtherVersion { keeper: version }),
            other => Err(unexpected(other)),
        }
    }

    /// The keeper's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How many descriptors it held when this connection was made.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether the keeper died or another daemon took over. [`AsFd`] gives a descriptor that becomes readable then, and never
    /// otherwise while no call is under way; it is for waiting only.
    pub fn lost(&self) -> bool {
        // With a call under way the connection may be readable for its sake.
        let Some(state) = self.state.try_lock() else { return false };
        *state == State::Broken || self.channel.has_news()
    }

    fn ask(
        &self,
        request: &Request,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(Answer, Option<OwnedFd>), KeeperError> {
        let mut state = self.state.lock();
        if *state == State::Broken {
            return Err(KeeperError::Lost);
        }
        let answered = exchange(&self.channel, request, descriptor);
        if answered.is_err() {
            *state = State::Broken;
        }
        answered
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Keeper {
    /// A keeper that was started here and is dead must not stay in the list of processes.
    fn drop(&mut self) {
        let Some(mut child) = self.child.lock().take() else { return };
        let until = Instant::now() + DEATH;
        while self.lost() && matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
    }
}

fn channel_to(socket: &Path) -> Result<Channel, KeeperError> {
    let absent = |source| KeeperError::Absent { socket: socket.to_owned(), source };
    let channel = Channel::connect(socket, LIMIT).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => absent(error),
        io::ErrorKind::WouldBlock => KeeperError::TimedOut,
        _ => KeeperError::Io(error),
    })?;
    match channel.peer()? {
        peer if peer.is_trusted() => Ok(channel),
        peer => Err(KeeperError::Untrusted { socket: socket.to_owned(), uid: peer.uid }),
    }
}

fn exchange(
    channel: &Channel,
    request: &Request,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(Answer, Option<OwnedFd>), KeeperError> {
    let bytes = encode_request(request)?;
    channel.send(&bytes, descriptor.as_slice()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => KeeperError::Lost,
        io::ErrorKind::WouldBlock => KeeperError::TimedOut,
        _ => KeeperError::Io(error),
    })?;
    let mut buffer = vec![0; LONGEST_MESSAGE];
    let (length, descriptors) = channel.receive(&mut buffer).map_err(|error| match error {
        PassError::Closed => KeeperError::Lost,
        PassError::Nothing => KeeperError::TimedOut,
        PassError::Io(error) => KeeperError::Io(error),
        other => KeeperError::Io(io::Error::other(other)),
    })?;
    let answer = decode_answer(&buffer[..length], descriptors.len())?;
    Ok((answer, descriptors.into_iter().next()))
}

fn done(answer: Answer) -> Result<(), KeeperError> {
    match answer {
        Answer::Done => Ok(()),
        other => Err(unexpected(other)),
    }
}

fn unexpected(answer: Answer) -> KeeperError {
    match answer {
        Answer::Refused { reason, detail } => KeeperError::Refused { reason, detail },
        Answer::OtherVersion { version } => KeeperError::OtherVersion { keeper: version },
        _ => KeeperError::WrongAnswer,
    }
}

/// Starts a keeper that belongs to nobody, and waits until it answers.
fn start(socket: &Path, exe: &Path) -> Result<Keeper, KeeperError> {
    let mut command = Command::new(exe);
    command.args(["keeper", "--while-needed", "--socket"]).arg(socket);
    // Not the store's credentials, nor the sockets that systemd passed to us; and no directory is kept from being unmounted.
    let ours = std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"SPEEDY_"));
    command.env_clear().envs(ours).current_dir("/").stdin(Stdio::null());
    program::detach(&mut command);
    let mut child = command.spawn()?;
    let until = Instant::now() + LIMIT;
    loop {
        // Before the question: one that ended because another was first may be found there.
        let status = child.try_wait()?;
        match Keeper::connect(socket) {
            Ok(keeper) => {
                match keeper.pid == child.id() {
                    true => *keeper.child.lock() = Some(child),
                    // Another was first; ours finds the socket taken.
                    false => end(child)?,
                }
                return Ok(keeper);
            }
            Err(KeeperError::Absent { .. } | KeeperError::Lost) => {
                if status.is_some() || Instant::now() > until {
                    end(child)?;
                    return Err(KeeperError::NotStarted { socket: socket.to_owned(), status });
                }
            }
            Err(other) => return Err(other),
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends a keeper that holds nothing.
fn end(mut child: Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}
