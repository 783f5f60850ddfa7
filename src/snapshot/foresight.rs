//! What an image that is being pulled will ask of the store, asked for beside its first layer.
//!
//! **What.** containerd asks for one layer after the other, and each answer takes the round trips of a ref, an index and metadata. Before it asks
//! for the first it has stored the image's configuration, which lists them all, and has published that (`/content/create`). When one of an
//! image's layers is asked for, those above it are looked up at the same time (`hit::foreseen`).
//!
//! **Where.** Owned by `snapshotter`, which is told of configurations by `daemon` and of layers by containerd.
//!
//! **Invariants.** A guess changes no answer but when it is there. Nothing is looked up for an image of which no layer was asked for: it may be
//! another snapshotter's. At most [`MOST`] images and layers are remembered, for [`KNOWN`]; configurations are hostile input, of which no more
//! than the documents of an image may have is read.
//!
//! **When it fails.** Each layer is looked up when it is asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::oci::ChainId;

/// How many images, and layers, are remembered.
const MOST: usize = 64;
/// How long an image's first layer may take to be asked for.
const KNOWN: Duration = Duration::from_secs(60);
/// How long a layer is remembered that was asked for before anything was known of its image: the news is a little later at most.
const ASKED: Duration = Duration::from_secs(5);

/// How many layers are looked up ahead of the one that is asked for: no image that works has more.
const AHEAD: usize = 128;

/// Images that are being pulled, and layers that were asked for.
#[derive(Debug, Default)]
pub(super) struct Foresight(Mutex<Pulls>);

#[derive(Debug, Default)]
struct Pulls {
    images: VecDeque<(Instant, Arc<[ChainId]>)>,
    asked: VecDeque<(Instant, ChainId, bool)>,
}

/// The layers of an image that are going to be asked for, from the bottom up: none of them is its first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ahead {
    image: Arc<[ChainId]>,
    from: usize,
}

impl Ahead {
    pub(super) fn chains(&self) -> impl Iterator<Item = &ChainId> {
        self.image.iter().skip(self.from).take(AHEAD)
    }

    /// The uppermost layer of the image.
    pub(super) fn top(&self) -> Option<&ChainId> {
        self.image.last()
    }
}

impl Foresight {
    /// The configuration of an image with these layers was stored; what is ahead if one of them was asked for already.
    pub(super) fn stored(&self, chains: Vec<ChainId>) -> Option<Ahead> {
        let (mut pulls, now) = (self.0.lock(), Instant::now());
        pulls.forget(now);
        let image: Arc<[ChainId]> = chains.into();
        let asked = |at: &usize| {
            pulls.asked.iter().any(|(_, asked, alone)| *asked == image[*at] && !(*alone && *at > 0))
        };
        if let Some(at) = (0..image.len()).rev().find(asked) {
            return Some(Ahead { image, from: at + 1 });
        }
        push(&mut pulls.images, (now, image));
        None
    }

    /// This layer is asked for; what is ahead in the images that have it, each of which is told once. `alone` says that it is asked for as
    /// if nothing were below it: whoever does that with all layers (containerd 2.2 and older, unpacking in parallel) cannot take them.
    pub(super) fn asks(&self, chain: &ChainId, alone: bool) -> Vec<Ahead> {
        let (mut pulls, now) = (self.0.lock(), Instant::now());
        pulls.forget(now);
        let mut ahead = Vec::new();
        pulls.images.retain(|(_, image)| match image.iter().position(|known| known == chain) {
            Some(at) if at > 0 && alone => true,
            Some(at) => {
                ahead.push(Ahead { image: Arc::clone(image), from: at + 1 });
                false
            }
            None => true,
        });
        if ahead.is_empty() {
            push(&mut pulls.asked, (now, chain.clone(), alone));
        }
        ahead
    }
}

impl Pulls {
    fn forget(&mut self, now: Instant) {
        self.images.retain(|(since, _)| now.duration_since(*since) < KNOWN);
        self.asked.retain(|(since, ..)| now.duration_since(*since) < ASKED);
    }
}

/// The oldest makes room.
fn push<T>(to: &mut VecDeque<T>, item: T) {
    if to.len() >= MOST {
        to.pop_front();
    }
    to.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    fn chains(letters: &str) -> Vec<ChainId> {
        let chain = |letter: char| {
            let hex = format!("{:x}", u32::from(letter)).repeat(32);
            ChainId(Digest::parse(&format!("sha256:{hex}")).unwrap())
        };
        letters.chars().map(chain).collect()
    }

    fn ahead(ahead: &Ahead) -> Vec<ChainId> {
        ahead.chains().cloned().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_layers_above_the_first_that_is_asked_for_are_told_once() {
        let foresight = Foresight::default();
        assert_eq!(foresight.stored(chains("abcd")), None);
        let found = foresight.asks(&chains("a")[0], true);
        assert_eq!(found.iter().map(ahead).collect::<Vec<_>>(), [chains("bcd")]);
        assert_eq!(found[0].top(), chains("d").first());
        assert_eq!(foresight.asks(&chains("b")[0], false), []);
    }

    #[tokio::test(start_paused = true)]
    async fn the_news_may_be_later_than_the_first_layer() {
        let foresight = Foresight::default();
        foresight.asks(&chains("a")[0], true);
        foresight.asks(&chains("b")[0], false);
        assert_eq!(ahead(&foresight.stored(chains("abcd")).unwrap()), chains("cd"));
        // Long after that the layer says nothing any more: it was asked for by another pull.
        tokio::time::advance(ASKED).await;
        assert_eq!(foresight.stored(chains("abcd")), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_ahead_of_who_asks_for_each_layer_as_if_it_were_the_first() {
        let foresight = Foresight::default();
        foresight.stored(chains("abc"));
        assert_eq!(foresight.asks(&chains("b")[0], true), []);
        assert_eq!(foresight.asks(&chains("c")[0], true), []);
        assert_eq!(ahead(&foresight.asks(&chains("b")[0], false)[0]), chains("c"));
        assert_eq!(foresight.stored(chains("xbc")), None, "the news is later");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_an_image_has_is_ahead() {
        let foresight = Foresight::default();
        let long: Vec<ChainId> =
            (0..1024).map(|n| ChainId(Digest::parse(&format!("sha256:{n:064x}")).unwrap())).collect();
        foresight.stored(long.clone());
        assert_eq!(ahead(&foresight.asks(&long[0], true)[0]), long[1..=AHEAD]);
    }

    #[tokio::test(start_paused = true)]
    async fn images_on_one_base_are_all_meant_and_others_are_left_alone() {
        let foresight = Foresight::default();
        for image in ["abc", "axy", "mno"] {
            assert_eq!(foresight.stored(chains(image)), None);
        }
        let found: Vec<_> = foresight.asks(&chains("a")[0], true).iter().map(ahead).collect();
        assert_eq!(found, [chains("bc"), chains("xy")]);
        tokio::time::advance(KNOWN).await;
        assert_eq!(foresight.asks(&chains("m")[0], true), []);
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_makes_room_and_an_image_without_layers_does_no_harm() {
        let foresight = Foresight::default();
        assert_eq!(foresight.stored(Vec::new()), None);
        foresight.stored(chains("ab"));
        for _ in 0..MOST {
            foresight.stored(chains("yz"));
        }
        assert_eq!(foresight.asks(&chains("a")[0], true), []);
        assert_eq!(foresight.asks(&chains("y")[0], true).len(), MOST);
    }
}
