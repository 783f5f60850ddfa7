//! The requests that were taken from the kernel and not answered yet, in memory that outlives this process.
//!
//! A request that a process has read is known to nobody else: if the process dies, its reader waits for ever. So requests are
//! read straight into *slots* of shared memory, which the keeper holds too, and a slot is cleared only after the answer.
//!
//! **Format.** The machine's words. A head of 4096 bytes (word 0: magic, word 1: *generation*, the number of processes that have
//! served); then `BANKS` banks of `SLOTS` slots of `LONGEST` bytes. A slot whose first word is 0 is free. Process `n`
//! reads into bank `n` modulo `BANKS`, so that a predecessor that is not quite dead yet never writes where its successor does.
//!
//! **When it fails.** A request whose answer was sent just before the process died is answered again: the kernel says that there
//! is no such request, and that is all.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use parking_lot::{Condvar, Mutex};

use super::message::{self, LONGEST, LOOKED_AT, Message};
use crate::sys::shared::{self, Shared};

const BANKS: usize = 4;
/// More than the kernel has reads under way, by those that somebody waits for in the foreground.
const SLOTS: usize = 384;
const HEAD: usize = 4096;
const LENGTH: usize = HEAD + BANKS * SLOTS * LONGEST;
const MAGIC: u64 = u64::from_be_bytes(*b"SpdyJnl1");

/// See the module's page.
#[derive(Debug)]
pub struct Journal {
    memory: Shared,
    bank: usize,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

/// A slot that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(usize);

impl Journal {
    /// New memory for a journal, to be given to [`Journal::open`] and to the keeper.
    pub fn memory() -> io::Result<OwnedFd> {
        shared::memory("speedy-journal", LENGTH as u64)
    }

    /// The journal in this memory, whoever used it before.
    pub fn open(memory: impl AsFd) -> io::Result<Journal> {
        let memory = Shared::map(memory, LENGTH)?;
        let head = memory.words();
        match head[0].load(Ordering::Acquire) {
            MAGIC => {}
            0 => head[0].store(MAGIC, Ordering::Release),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "not a journal of this version")),
        }
        let generation = head[1].fetch_add(1, Ordering::AcqRel);
        let bank = usize::try_from(generation % BANKS as u64).map_err(io::Error::other)?;
        let slots = (bank * SLOTS..(bank + 1) * SLOTS).rev().collect();
        let journal = Journal { memory, bank, free: Mutex::new(slots), freed: Condvar::new() };
        // Of so old a process that its successors have answered everything in it.
        (bank * SLOTS..(bank + 1) * SLOTS).for_each(|slot| journal.clear(Slot(slot)));
        Ok(journal)
    }

    /// A free slot; waits for one.
    pub fn take(&self) -> Slot {
        let mut free = self.free.lock();
        loop {
            if let Some(slot) = free.pop() {
                return Slot(slot);
            }
            self.freed.wait(&mut free);
        }
    }

    /// Reads the next request into the slot; `None` if it is none that can be understood.
    pub fn receive(&self, slot: Slot, connection: &OwnedFd) -> io::Result<Option<Message>> {
        let read = self.memory.read_into(at(slot.0), LONGEST, connection.as_fd())?;
        Ok(self.message(slot, read))
    }

    /// The request in the slot is answered: the slot is free again.
    pub fn answered(&self, slot: Slot) {
        self.clear(slot);
        if slot.0 / SLOTS == self.bank {
            self.free.lock().push(slot.0);
            self.freed.notify_one();
        }
    }

    /// What predecessors read and did not answer.
    pub fn left(&self) -> Vec<(Slot, Message)> {
        let words = self.memory.words();
        let taken = |slot: &usize| words[at(*slot) / 8].load(Ordering::Acquire) != 0;
        let left = self.others().filter(taken);
        left.filter_map(|slot| Some((Slot(slot), self.message(Slot(slot), LOOKED_AT)?))).collect()
    }

    /// Forgets what predecessors did not answer; tells whether there was anything.
    pub fn forget_left(&self) -> bool {
        let words = self.memory.words();
        self.others().fold(false, |any, slot| {
            let taken = words[at(slot) / 8].swap(0, Ordering::AcqRel) != 0;
            any || taken
        })
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        (0..BANKS * SLOTS).filter(|slot| slot / SLOTS != self.bank)
    }

    fn message(&self, slot: Slot, read: usize) -> Option<Message> {
        message::parse(
            &self.memory.copy(at(slot.0), read.min(LOOKED_AT).next_multiple_of(8))[..read.min(LOOKED_AT)],
        )
    }

    fn clear(&self, slot: Slot) {
        self.memory.words()[at(slot.0) / 8].store(0, Ordering::Release);
    }
}

fn at(slot: usize) -> usize {
    HEAD + slot * LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn request(unique: u64) -> Vec<u8> {
        let mut bytes = vec![0; 80];
        bytes[..4].copy_from_slice(&80_u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&15_u32.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes
    }

    fn receive(journal: &Journal, unique: u64) -> (Slot, Message) {
        let (source, mut sink) = std::io::pipe().unwrap();
        sink.write_all(&request(unique)).unwrap();
        let slot = journal.take();
        (slot, journal.receive(slot, &source.into()).unwrap().unwrap())
    }

    #[test]
    fn a_successor_finds_what_was_not_answered() {
        let memory = Journal::memory().unwrap();
        let first = Journal::open(&memory).unwrap();
        let (answered, _) = receive(&first, 1);
        let (_, left) = receive(&first, 2);
        first.answered(answered);
        let second = Journal::open(&memory).unwrap();
        let found = second.left();
        assert_eq!(found.iter().map(|(_, message)| message).collect::<Vec<_>>(), [&left]);
        // The predecessor may still be reading.
        let (_, late) = receive(&first, 3);
        second.answered(found[0].0);
        assert_eq!(second.left().into_iter().map(|(_, message)| message).collect::<Vec<_>>(), [late]);
        assert!(second.forget_left());
        assert!(!second.forget_left());
    }

    #[test]
    fn slots_come_back() {
        let journal = Journal::open(Journal::memory().unwrap()).unwrap();
        for unique in 0..3 * SLOTS as u64 {
            let (slot, _) = receive(&journal, unique + 1);
            journal.answered(slot);
        }
    }

    #[test]
    fn other_memory_is_refused() {
        let memory = shared::memory("test", LENGTH as u64).unwrap();
        Shared::map(&memory, LENGTH).unwrap().words()[0].store(5, Ordering::Release);
        assert!(Journal::open(&memory).is_err());
    }
}
