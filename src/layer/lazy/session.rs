//! Serving a FUSE connection: requests in, bytes of layer images out.
//!
//! A few threads take requests. What is on this node they answer at once; a read that must fetch becomes a task, so that any
//! number of them are under way.

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::runtime::Handle;

use super::journal::{Journal, Slot};
use super::message::{self, Message, Request};
use crate::layer::work::Work;
use crate::sys::fuse;

const THREADS: usize = 4;
/// When it is looked again whether a predecessor, which may have died only after we came, has taken a request.
const LOOKS: [u64; 6] = [20, 100, 400, 1000, 3000, 10_000];

const EIO: i32 = 5;
const ENOENT: i32 = 2;
const ENODEV: i32 = 19;
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const ENOSYS: i32 = 38;

/// Where the bytes are.
#[async_trait]
pub trait Source: Send + Sync + std::fmt::Debug {
    /// How long a layer image is; `None` if there is none of this serial. Blocking.
    fn size(&self, serial: u64) -> Option<u64>;

    /// The bytes of a layer image from `offset` on, all `size` of them, if they are on this node. Blocking.
    fn read_now(&self, serial: u64, offset: u64, size: u32) -> Option<Vec<Bytes>>;

    /// The same wherever they are; `None` if they cannot be had.
    async fn read(&self, serial: u64, offset: u64, size: u32) -> Option<Vec<Bytes>>;
}

/// What was served.
#[derive(Debug, Default)]
pub struct Counts {
    /// Reads that were answered with bytes.
    pub reads: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Reads that failed.
    pub failed: AtomicU64,
    /// Requests that a predecessor had taken.
    pub taken_over: AtomicU64,
}

/// The same at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Reads that were answered with bytes.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Reads that failed.
    pub failed: u64,
    /// Requests that a predecessor had taken.
    pub taken_over: u64,
}

impl Counts {
    /// As they are now.
    pub fn numbers(&self) -> Numbers {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counts { reads, bytes, failed, taken_over } = self;
        Numbers { reads: read(reads), bytes: read(bytes), failed: read(failed), taken_over: read(taken_over) }
    }
}

/// One connection that is being served.
#[derive(Debug)]
pub struct Session {
    connection: Arc<OwnedFd>,
    journal: Journal,
    source: Arc<dyn Source>,
    runtime: Handle,
    work: Arc<Work>,
    ended: AtomicBool,
    /// See there.
    pub counts: Counts,
}

/// Whether somebody served the connection before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Nobody did.
    First,
    /// What predecessors did not answer, the kernel sends again, where it can; else it is taken from the journal.
    Again,
    /// The same on a kernel that is not asked, as if it were older than 6.9.
    ByJournal,
}

impl Session {
    /// Serves until the connection ends; the threads are not waited for.
    pub fn start(
        connection: Arc<OwnedFd>,
        journal: Journal,
        source: Arc<dyn Source>,
        work: Arc<Work>,
        resume: Resume,
    ) -> io::Result<Arc<Session>> {
        let (ended, counts) = (AtomicBool::new(false), Counts::default());
        let runtime = Handle::current();
        let session = Arc::new(Session { connection, journal, source, runtime, work, ended, counts });
        for number in 0..THREADS {
            let session = Arc::clone(&session);
            let name = format!("layers-{number}");
            std::thread::Builder::new().name(name).spawn(move || session.serve())?;
        }
        if resume != Resume::First {
            let resuming = Arc::clone(&session);
            let resume = move || resuming.resume(resume);
            std::thread::Builder::new().name("layers-resume".into()).spawn(resume)?;
        }
        Ok(session)
    }

    /// Whether nobody can read through this connection any more.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn serve(self: &Arc<Self>) {
        let mut slot = self.journal.take();
        loop {
            match self.journal.receive(slot, &self.connection) {
                Ok(Some(message)) => {
                    self.handle(slot, message);
                    slot = self.journal.take();
                }
                Ok(None) => {
                    tracing::warn!("a request of the kernel was cut short");
                    self.journal.answered(slot);
                    slot = self.journal.take();
                }
                // ENOENT: its reader went away while it was being handed over.
                Err(error) if matches!(error.raw_os_error(), Some(ENOENT | EINTR | EAGAIN)) => {}
                Err(error) => {
                    if !self.ended.swap(true, Ordering::AcqRel) {
                        match error.raw_os_error() {
                            Some(ENODEV) => tracing::info!("nobody reads layers lazily any more"),
                            _ => tracing::error!(%error, "layers can no longer be read lazily"),
                        }
                    }
                    return;
                }
            }
        }
    }

    /// What the kernel sends again comes to everybody; what the journal holds is handled here.
    fn resume(self: &Arc<Self>, resume: Resume) {
        let resend = || fuse::write(&self.connection, &[IoSlice::new(&message::resend())]);
        // Asked before anything is forgotten: where the kernel refuses, the journal is all there is. And again afterwards, for what
        // a predecessor may have taken between the two.
        let resent = resume == Resume::Again && resend().is_ok() && {
            self.journal.forget_left();
            resend().is_ok()
        };
        let mut replayed = HashSet::new();
        if !resent {
            self.replay(&mut replayed);
        }
        for pause in LOOKS {
            std::thread::sleep(Duration::from_millis(pause));
            if resent && self.journal.forget_left() {
                // What is being answered is then sent again as well, and answered twice: harmless.
                if let Err(error) = resend() {
                    tracing::warn!(%error, "the kernel does not repeat what a predecessor took");
                }
            } else if !resent {
                self.replay(&mut replayed);
            }
        }
    }

    /// Each request once: its answer may take longer than it is until the next look.
    fn replay(self: &Arc<Self>, replayed: &mut HashSet<(Slot, u64)>) {
        for (slot, message) in self.journal.left() {
            if replayed.insert((slot, message.unique)) {
                self.counts.taken_over.fetch_add(1, Ordering::Relaxed);
                self.handle(slot, message);
            }
        }
    }

    fn handle(self: &Arc<Self>, slot: Slot, message: Message) {
        let Message { unique, node, request } = message;
        let serial = message::serial(node);
        match request {
            Request::Read { offset, size } => return self.read(slot, unique, serial, offset, size),
            Request::Silent => {}
            Request::Init { version, flags, read_ahead } => match message::init(version, flags, read_ahead) {
                Some(body) => self.answer(unique, &[&body]),
                None => self.refuse(unique, EIO),
            },
            Request::Lookup { serial } => match serial.and_then(|n| Some((n, self.source.size(n)?))) {
                Some((serial, size)) => self.answer(unique, &[&message::entry(serial, size)]),
                None => self.refuse(unique, ENOENT),
            },
            Request::Attributes => match serial.map_or(Some(0), |serial| self.source.size(serial)) {
                Some(size) => self.answer(unique, &[&message::attributes(node, size)]),
                None => self.refuse(unique, EIO),
            },
            Request::Open => self.answer(unique, &[&message::opened()]),
            Request::Statistics => self.answer(unique, &[&message::statistics()]),
            Request::Nothing => self.answer(unique, &[]),
            Request::Other => self.refuse(unique, ENOSYS),
        }
        self.journal.answered(slot);
    }

    fn read(self: &Arc<Self>, slot: Slot, unique: u64, serial: Option<u64>, offset: u64, size: u32) {
        let Some(serial) = serial.filter(|_| size <= message::LONGEST_READ) else {
            self.refuse(unique, EIO);
            return self.journal.answered(slot);
        };
        if let Some(pieces) = self.source.read_now(serial, offset, size) {
            return self.answer_read(slot, unique, Some(&pieces));
        }
        let this = Arc::clone(self);
        self.work.spawn(&self.runtime, async move {
            let pieces = this.source.read(serial, offset, size).await;
            this.answer_read(slot, unique, pieces.as_deref());
        });
    }

    fn answer_read(&self, slot: Slot, unique: u64, pieces: Option<&[Bytes]>) {
        match pieces {
            Some(pieces) => {
                let parts: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
                let bytes: usize = parts.iter().map(|part| part.len()).sum();
                self.answer(unique, &parts);
                self.counts.reads.fetch_add(1, Ordering::Relaxed);
                self.counts.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            None => {
                self.refuse(unique, EIO);
                self.counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.journal.answered(slot);
    }

    fn answer(&self, unique: u64, parts: &[&[u8]]) {
        let header = message::header(unique, 0, parts.iter().map(|part| part.len()).sum());
        let mut all = vec![IoSlice::new(&header)];
        all.extend(parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)));
        self.write(&all);
    }

    fn refuse(&self, unique: u64, errno: i32) {
        self.write(&[IoSlice::new(&message::header(unique, errno, 0))]);
    }

    fn write(&self, parts: &[IoSlice<'_>]) {
        match fuse::write(&self.connection, parts) {
            // Whoever asked is gone, or a predecessor has answered.
            Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ENODEV)) => {}
            Err(error) => tracing::error!(%error, "an answer to the kernel was refused"),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[derive(Debug)]
    struct Nothing;

    #[async_trait]
    impl Source for Nothing {
        fn size(&self, _: u64) -> Option<u64> {
            None
        }

        fn read_now(&self, _: u64, _: u64, _: u32) -> Option<Vec<Bytes>> {
            None
        }

        async fn read(&self, _: u64, _: u64, _: u32) -> Option<Vec<Bytes>> {
            None
        }
    }

    /// On a kernel that sends nothing again the journal was cleared before the kernel was asked: readers would have waited for ever.
    #[tokio::test]
    async fn where_the_kernel_sends_nothing_again_the_journal_is_answered() {
        let memory = Journal::memory().unwrap();
        let predecessor = Journal::open(&memory).unwrap();
        let (taken, mut sink) = io::pipe().unwrap();
        let mut request = [0; 80];
        request[..4].copy_from_slice(&80_u32.to_ne_bytes());
        request[4..8].copy_from_slice(&15_u32.to_ne_bytes());
        sink.write_all(&request).unwrap();
        predecessor.receive(predecessor.take(), &taken.into()).unwrap().unwrap();
        // Reads of it wait, and nothing can be written to it; its other end stays open as long as the threads.
        let (connection, other_end) = io::pipe().unwrap();
        std::mem::forget(other_end);
        let (journal, work) = (Journal::open(&memory).unwrap(), Arc::default());
        let connection = Arc::new(connection.into());
        let session = Session::start(connection, journal, Arc::new(Nothing), work, Resume::Again).unwrap();
        let answered = async {
            while session.counts.taken_over.load(Ordering::Relaxed) == 0 || !session.journal.left().is_empty()
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), answered).await.unwrap();
    }
}
