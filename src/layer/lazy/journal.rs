//! The requests that were taken from the kernel and not answered yet, in memory that outlives this process.
//!
//! A request that a process has read is known to nobody else: if the process dies, its reader waits for ever. So requests are
//! read straight into *slots* of shared memory, which the keeper holds too, and a slot is cleared only after the answer.
//!
//! **Format.** The machine's words. A head of 4096 bytes (word 0: magic, word 1: *generation*, the number of processes that have
//! served); then `BANKS` banks of `SLOTS` slots of `LONGEST` bytes. A slot whose first word is 0 is free. Process `n`
//! reads into bank `n` modulo `BANKS`, so that a predecessor that is not quite dead yet never writes where its successor does.
//! What process `n - BANKS` left there stays until it is answered: nobody else knows of it.
//!
//! **When it fails.** A request whose answer was sent just before the process died is answered again: the kernel says that there
//! is no such request, and that is all.

use std::collections::HashSet;
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
    /// Slots of our bank that were taken when we came; none of ours until they are answered.
    inherited: Mutex<HashSet<usize>>,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

/// A slot that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
        let is_free = |slot: &usize| memory.words()[at(*slot) / 8].load(Ordering::Acquire) == 0;
        let (free, inherited): (Vec<usize>, Vec<usize>) =
            (bank * SLOTS..(bank + 1) * SLOTS).rev().partition(is_free);
        let (inherited, free) = (Mutex::new(inherited.into_iter().collect()), Mutex::new(free));
        Ok(Journal { memory, bank, inherited, free, freed: Condvar::new() })
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

    /// The request in the slot is answered: the slot is free again. To be called once.
    pub fn answered(&self, slot: Slot) {
        self.memory.words()[at(slot.0) / 8].store(0, Ordering::Release);
        self.release(slot.0);
    }

    fn release(&self, slot: usize) {
        self.inherited.lock().remove(&slot);
        if slot / SLOTS == self.bank {
            self.free.lock().push(slot);
            self.freed.notify_one();
        }
    }

    /// What predecessors read and did not answer.
    pub fn left(&self) -> Vec<(Slot, Message)> {
        let words = self.memory.words();
        let taken = |slot: &usize| words[at(*slot) / 8].load(Ordering::Acquire) != 0;
        let left = self.others().into_iter().filter(taken);
        left.filter_map(|slot| Some((Slot(slot), self.message(Slot(slot), LOOKED_AT)?))).collect()
    }

    /// Forgets what predecessors did not answer; tells whether there was anything.
    pub fn forget_left(&self) -> bool {
        let words = self.memory.words();
        let taken = |slot: &usize| words[at(*slot) / 8].swap(0, Ordering::AcqRel) != 0;
        let left: Vec<usize> = self.others().into_iter().filter(taken).collect();
        left.iter().for_each(|slot| self.release(*slot));
        !left.is_empty()
    }

    /// The slots that are not ours, or not ours yet.
    fn others(&self) -> Vec<usize> {
        let inherited = self.inherited.lock();
        (0..BANKS * SLOTS).filter(|slot| slot / SLOTS != self.bank || inherited.contains(slot)).collect()
    }

    fn message(&self, slot: Slot, read: usize) -> Option<Message> {
        message::parse(
            &self.memory.copy(at(slot.0), read.min(LOOKED_AT).next_multiple_of(8))[..read.min(LOOKED_AT)],
        )
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

    /// A process that came to a bank cleared it, because surely somebody between had answered what was in it. When processes died
    /// faster than the store answered, nobody had, and the readers waited for ever.
    #[test]
    fn what_outlasts_as_many_processes_as_there_are_banks_is_not_lost() {
        let memory = Journal::memory().unwrap();
        let (_, asked) = receive(&Journal::open(&memory).unwrap(), 1);
        for _ in 0..3 * BANKS {
            let journal = Journal::open(&memory).unwrap();
            let left = journal.left();
            assert_eq!(left.iter().map(|(_, message)| message).collect::<Vec<_>>(), [&asked]);
            // A request of its own, which it answers.
            let (slot, _) = receive(&journal, 2);
            journal.answered(slot);
            assert_eq!(journal.left(), left);
        }
        for _ in 0..BANKS {
            let journal = Journal::open(&memory).unwrap();
            journal.left().iter().for_each(|(slot, _)| journal.answered(*slot));
            let slots: HashSet<Slot> = (0..SLOTS).map(|_| journal.take()).collect();
            assert_eq!(slots.len(), SLOTS);
        }
        let (first, last) = (Journal::open(&memory).unwrap(), BANKS - 1);
        receive(&first, 3);
        (0..last).for_each(|_| drop(Journal::open(&memory).unwrap()));
        let journal = Journal::open(&memory).unwrap();
        assert!(journal.forget_left() && !journal.forget_left());
        for _ in 0..SLOTS {
            journal.take();
        }
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
