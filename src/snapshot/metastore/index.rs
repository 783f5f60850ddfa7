//! What the records say, in memory: every read is answered from here, so no read waits for the disk or for a writer.
//!
//! The writer thread changes it after each durable transaction and before the callers are answered; nobody else does.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::layers::{LayerRecord, Origin, PublishEntry};
use crate::driver::Id;
use crate::image::Facts;
use crate::oci::ChainId;
use crate::snapshot::{Info, Key, Kind, Usage};

/// One snapshot as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its storage.
    pub id: Id,
    /// What containerd sees of it.
    pub info: Info,
    /// The chain ID it answers for, if it is the one that does for its parent.
    pub answers_for: Option<String>,
    /// What it takes; known for committed snapshots once measured.
    pub usage: Option<Usage>,
    /// The layer image that is its content, below its own directory.
    pub layer: Option<u64>,
    /// Whether its own directory is part of its content.
    pub own: Own,
}

/// Whether a snapshot's own directory is part of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// It is: files were written there, or may be.
    Used,
    /// It is not: the layer image is everything.
    Unused,
}

/// What lies below a snapshot.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stack {
    /// What to mount, uppermost first: directories of snapshots and layer images, each once. A layer image that occurs several
    /// times is only there where it is uppermost: overlayfs refuses it twice, and what it would add below is hidden by itself.
    pub below: Vec<Id>,
    /// Those of them that are layer images.
    pub layers: Vec<Id>,
}

/// How many there are of each.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Views.
    pub views: usize,
    /// Active snapshots.
    pub active: usize,
    /// Committed snapshots.
    pub committed: usize,
    /// Ids made ahead.
    pub pending: usize,
    /// Ids whose storage is still to be freed.
    pub removing: usize,
    /// Bytes of all committed snapshots measured so far.
    pub committed_bytes: u64,
}

/// One step of a transaction's effect.
#[derive(Debug)]
pub(super) enum Change {
    /// This is the record of its key now; the second is the key it had before, if that was another.
    Put(Arc<Record>, Option<Key>),
    /// No such snapshot any more; its storage is to be freed.
    Drop(Key),
    /// A new Id, made ahead.
    Pending(Id),
    /// An Id that no snapshot will use.
    Discarded(Id),
    /// The storage is freed; the Id is gone.
    Gone(Id),
    /// Somebody else has this Id's slot.
    Held(Id),
    /// This is the record of a layer image now.
    Layer(Arc<LayerRecord>),
    /// No such layer image any more; its storage is to be freed.
    LayerGone(Id),
    /// This is the entry of its chain in the publish queue now.
    Queued(PublishEntry),
    /// The chain is not to be published any more.
    Unqueued(ChainId),
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Index {
    snapshots: BTreeMap<Key, Arc<Record>>,
    answering: HashMap<(String, Option<Key>), Key>,
    unmeasured: BTreeSet<Key>,
    pending: BTreeSet<Id>,
    removing: BTreeSet<Id>,
    held: BTreeSet<Id>,
    slots: BTreeSet<u32>,
    layers: BTreeMap<u64, Arc<LayerRecord>>,
    queue: BTreeMap<ChainId, PublishEntry>,
}

impl Index {
    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Record>> {
        self.snapshots.get(key)
    }

    pub(super) fn all(&self) -> Vec<Arc<Record>> {
        self.snapshots.values().cloned().collect()
    }

    /// What lies below `record`, its own layer image included.
    pub(super) fn stack(&self, record: &Record) -> Stack {
        let mut stack = Stack::default();
        let mut seen = HashSet::new();
        self.push_layer(&mut stack, &mut seen, record);
        let parent = record.info.parent.as_ref().and_then(|key| self.snapshots.get(key));
        self.push_chain(&mut stack, &mut seen, parent);
        stack
    }

    /// What lies below a child of `record`.
    pub(super) fn stack_with(&self, record: &Arc<Record>) -> Stack {
        let (mut stack, mut seen) = (Stack::default(), HashSet::new());
        self.push_chain(&mut stack, &mut seen, Some(record));
        stack
    }

    fn push_chain(&self, stack: &mut Stack, seen: &mut HashSet<u64>, from: Option<&Arc<Record>>) {
        let mut at = from;
        while let Some(record) = at {
            if record.own == Own::Used {
                stack.below.push(record.id);
            }
            self.push_layer(stack, seen, record);
            at = record.info.parent.as_ref().and_then(|key| self.snapshots.get(key));
        }
    }

    fn push_layer(&self, stack: &mut Stack, seen: &mut HashSet<u64>, record: &Record) {
        if let Some(layer) = record.layer.and_then(|serial| self.layers.get(&serial))
            && seen.insert(layer.id.serial)
        {
            stack.below.push(layer.id);
            stack.layers.push(layer.id);
        }
    }

    pub(super) fn layer(&self, serial: u64) -> Option<&Arc<LayerRecord>> {
        self.layers.get(&serial)
    }

    pub(super) fn layers(&self) -> Vec<Arc<LayerRecord>> {
        self.layers.values().cloned().collect()
    }

    pub(super) fn layer_of(&self, facts: &Facts, origin: Origin) -> Option<&Arc<LayerRecord>> {
        self.layers.values().find(|layer| {
            let same = layer.facts.diff_id == facts.diff_id && layer.facts.attributes == facts.attributes;
            same && layer.origin == origin
        })
    }

    pub(super) fn claims(&self) -> HashMap<u64, usize> {
        let mut claims = HashMap::new();
        for serial in self.snapshots.values().filter_map(|record| record.layer) {
            *claims.entry(serial).or_default() += 1;
        }
        claims
    }

    pub(super) fn layers_in_use(&self) -> HashSet<u64> {
        let mounted = self.snapshots.values().filter(|record| record.info.kind != Kind::Committed);
        mounted.flat_map(|record| self.stack(record).layers).map(|id| id.serial).collect()
    }

    pub(super) fn by_serial(&self, serial: u64) -> Option<Arc<Record>> {
        self.snapshots.values().find(|record| record.id.serial == serial).cloned()
    }

    pub(super) fn publish_queue(&self) -> Vec<PublishEntry> {
        let mut queue: Vec<PublishEntry> = self.queue.values().cloned().collect();
        queue.sort_by_key(|entry| entry.added);
        queue
    }

    pub(super) fn answering(&self, chain: &str, parent: Option<&Key>) -> Option<&Arc<Record>> {
        self.snapshots.get(self.answering.get(&(chain.to_owned(), parent.cloned()))?)
    }

    pub(super) fn unmeasured(&self, skip: &HashSet<Id>) -> Option<Arc<Record>> {
        let mut records = self.unmeasured.iter().filter_map(|key| self.snapshots.get(key));
        records.find(|record| !skip.contains(&record.id)).cloned()
    }

    pub(super) fn pending(&self) -> Vec<Id> {
        self.pending.iter().copied().collect()
    }

    pub(super) fn removing(&self) -> Vec<Id> {
        self.removing.iter().copied().collect()
    }

    /// Every Id there is, but for those that are somebody else's.
    pub(super) fn ids(&self) -> Vec<Id> {
        let snapshots = self.snapshots.values().map(|record| record.id);
        let layers = self.layers.values().map(|layer| layer.id);
        snapshots.chain(layers).chain(self.pending()).chain(self.removing()).collect()
    }

    /// The snapshots whose content is written into storage of their own.
    pub(super) fn volumes(&self) -> Vec<&Arc<Record>> {
        self.snapshots.values().filter(|record| record.info.kind != Kind::View).collect()
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts =
            Counts { pending: self.pending.len(), removing: self.removing.len(), ..Counts::default() };
        for record in self.snapshots.values() {
            match record.info.kind {
                Kind::View => counts.views += 1,
                Kind::Active => counts.active += 1,
                Kind::Committed => counts.committed += 1,
            }
            counts.committed_bytes += record.usage.map_or(0, |usage| usage.bytes);
        }
        counts
    }

    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Put(record, before) => {
                if let Some(before) = before {
                    self.snapshots.remove(&before);
                }
                self.put(record);
            }
            Change::Drop(key) => {
                if let Some(record) = self.snapshots.remove(&key) {
                    self.unmeasured.remove(&key);
                    self.no_longer_answers(&record);
                    self.removing.insert(record.id);
                }
            }
            Change::Pending(id) => {
                self.slots.insert(id.slot);
                self.pending.insert(id);
            }
            Change::Held(id) => {
                self.slots.insert(id.slot);
                self.pending.remove(&id);
                self.held.insert(id);
            }
            Change::Discarded(id) => {
                self.slots.insert(id.slot);
                self.pending.remove(&id);
                self.removing.insert(id);
            }
            Change::Gone(id) => {
                self.slots.remove(&id.slot);
                self.held.remove(&id);
                self.pending.remove(&id);
                self.removing.remove(&id);
            }
            Change::Layer(layer) => {
                self.slots.insert(layer.id.slot);
                self.pending.remove(&layer.id);
                self.layers.insert(layer.id.serial, layer);
            }
            Change::LayerGone(id) => {
                self.layers.remove(&id.serial);
                self.queue.retain(|_, entry| entry.layer != Some(id.serial));
                self.removing.insert(id);
            }
            Change::Queued(entry) => {
                self.queue.insert(entry.chain.clone(), entry);
            }
            Change::Unqueued(chain) => {
                self.queue.remove(&chain);
            }
        }
    }

    fn put(&mut self, record: Arc<Record>) {
        let key = record.info.name.clone();
        self.slots.insert(record.id.slot);
        self.pending.remove(&record.id);
        if let Some(before) = self.snapshots.get(&key).cloned() {
            self.no_longer_answers(&before);
        }
        if let Some(chain) = &record.answers_for {
            self.answering.insert((chain.clone(), record.info.parent.clone()), key.clone());
        }
        match record.usage {
            None if record.info.kind == Kind::Committed => self.unmeasured.insert(key.clone()),
            _ => self.unmeasured.remove(&key),
        };
        self.snapshots.insert(key, record);
    }

    fn no_longer_answers(&mut self, record: &Record) {
        if let Some(chain) = &record.answers_for {
            self.answering.remove(&(chain.clone(), record.info.parent.clone()));
        }
    }
}

/// The slots that one transaction may give out: those that no Id has, and that it has not given already.
#[derive(Debug)]
pub(super) struct Slots<'a> {
    index: &'a Index,
    next: u32,
}

impl<'a> Slots<'a> {
    pub(super) fn new(index: &'a Index) -> Slots<'a> {
        Slots { index, next: 0 }
    }

    /// The smallest ones.
    pub(super) fn take(&mut self, count: usize) -> Vec<u32> {
        let mut used = self.index.slots.range(self.next..).copied().peekable();
        let mut free = Vec::with_capacity(count);
        while free.len() < count {
            match used.next_if_eq(&self.next) {
                Some(_) => {}
                None => free.push(self.next),
            }
            self.next += 1;
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_free_slots_are_found() {
        let mut index = Index::default();
        assert_eq!(Slots::new(&index).take(3), [0, 1, 2]);
        for (serial, slot) in [(1, 0), (2, 1), (3, 4)] {
            index.apply(Change::Pending(Id { serial, slot }));
        }
        let mut slots = Slots::new(&index);
        assert_eq!(slots.take(1), [2]);
        assert_eq!(slots.take(3), [3, 5, 6]);
        index.apply(Change::Gone(Id { serial: 1, slot: 0 }));
        assert_eq!(Slots::new(&index).take(2), [0, 2]);
    }
}
