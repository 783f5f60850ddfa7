//! Random small layers in which everything meets everything: few names, many kinds.

use super::{Item, Tar};

/// xorshift64*.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }

    pub(crate) fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }
}

/// The layer of `seed`. A good half of them is refused sooner or later.
pub(crate) fn layer(seed: u64) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let length = 1 + random.below(14);
    let mut made: Vec<Vec<u8>> = Vec::new();
    let items: Vec<Item> = (0..length).map(|_| item(&mut random, &mut made)).collect();
    Tar::of(items)
}

fn name(random: &mut Random) -> Vec<u8> {
    let depth = 1 + random.below(3);
    let names: Vec<&str> = (0..depth).map(|_| random.of(&["a", "b", "c"])).collect();
    let prefix = random.of(&["", "", "", "", "./", "/", "a/../"]);
    [prefix.as_bytes(), names.join("/").as_bytes()].concat()
}

fn item(random: &mut Random, made: &mut Vec<Vec<u8>>) -> Item {
    let mut name = name(random);
    let any = |random: &mut Random, made: &[Vec<u8>]| match made {
        [] => b"a".to_vec(),
        made => made[usize::try_from(random.below(made.len() as u64)).unwrap()].clone(),
    };
    let item = match random.below(20) {
        0..=4 => Item::dir(&name),
        5..=9 => {
            let content = vec![7; usize::try_from(random.below(3) * 5000).unwrap()];
            Item::file(&name, content)
        }
        10..=12 => {
            let target = random
                .of(&["a", "b", "../a", "../../b", "/c", "/a/b", "b/../a", ".", "..", "nowhere", "c/a"]);
            Item::symlink(&name, target)
        }
        13..=14 => Item::hard_link(&name, any(random, made)),
        15..=16 => {
            let at = name.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
            drop(name.splice(at..at, *b".wh."));
            Item::file(&name, b"")
        }
        17 => {
            let at = name.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
            name.truncate(at);
            name.extend(b".wh..wh..opq");
            Item::file(&name, b"")
        }
        18 => Item {
            device: (random.below(3), random.below(700)),
            ..Item::new(*random.of(&[&b'3', &b'4']), &name)
        },
        _ => Item::new(b'6', &name),
    };
    // `..` in the target of a hard link is refused here alone.
    made.push(item.name.strip_prefix(b"a/../").unwrap_or(&item.name).to_vec());
    let modes = [0o755, 0o644, 0o2755, 0o4711, 0o1777, 0o2070];
    let mut item = item.mode(modes[usize::try_from(random.below(6)).unwrap()]);
    item = item.owner(random.below(3), 10 * random.below(3)).mtime(random.below(1_700_000_000));
    if random.below(6) == 0 {
        item.gid = u64::from(u32::MAX);
    }
    if random.below(8) == 0 {
        let revision_2 = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        item = item.xattr("security.capability", revision_2);
    }
    match random.below(12) {
        0 => item.xattr("user.x", b"one"),
        1 => item.xattr("user.y", b"").xattr("trusted.z", b"no").xattr("strange", b"no"),
        2 => item.pax("mtime", format!("{}.{:09}", random.below(1_700_000_000), random.below(1_000_000_000))),
        _ => item,
    }
}
