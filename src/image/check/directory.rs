//! The names of a directory, sorted, in blocks; what is behind the full ones may stand inline, behind the inode.
//!
//! ```text
//! a block: entries of 12 bytes, then their names in the same order, then zeros
//!  0 nid u64, 8 where the name begins in the block u16, 10 type u8, 11 reserved u8
//! ```
//! There are as many entries as fit before the first name. A name ends where the next begins; the last one ends at the
//! first zero, at the end of the block, or where the directory's size ends.

use super::reader::Window;
use super::record::{Inode, Kind, is_zero, u16_at, u64_at};
use super::{CheckError, Part, require};
use crate::image::BLOCK;

const ENTRY: usize = 12;
/// The longest name (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// One name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) nid: u64,
    /// As [`super::record::Kind::in_directory`].
    pub(super) kind: u8,
    pub(super) name: &'a [u8],
}

/// Calls `visit` with every entry of `directory`, `.` and `..` among them, in the order of the names, which is checked. The windows are for
/// blocks and for what stands behind inodes, which are far from each other: one for both would be filled anew for each directory.
pub(super) fn each<'i, 'b>(
    (inodes, blocks): (&mut Window<'i>, &mut Window<'b>),
    directory: &Inode,
    visit: &mut dyn FnMut(Entry<'_>) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    require_directory(directory)?;
    let mut last = Vec::new();
    for number in 0..directory.size.div_ceil(BLOCK) {
        let place = directory.names_at(number);
        let (at, used) = (place.start, (directory.size - number * BLOCK).min(BLOCK));
        let is_in_block = number < directory.blocks();
        let bytes = if is_in_block { blocks.bytes(place) } else { inodes.bytes(place) }?;
        block(bytes, at, used, &mut |entry| {
            let sorted = last.is_empty() || last.as_slice() < entry.name;
            require(sorted, Part::Directory, at, "names are sorted and distinct")?;
            last.clear();
            last.extend_from_slice(entry.name);
            visit(entry)
        })?;
    }
    Ok(())
}

/// The nid of `name` in `directory`, whose blocks are searched as the kernel does.
pub(super) fn find(
    window: &mut Window<'_>,
    directory: &Inode,
    name: &[u8],
) -> Result<Option<u64>, CheckError> {
    require_directory(directory)?;
    let (mut low, mut high) = (0, directory.size.div_ceil(BLOCK));
    while low < high {
        let middle = low + (high - low) / 2;
        let place = directory.names_at(middle);
        let (at, used) = (place.start, (directory.size - middle * BLOCK).min(BLOCK));
        let (mut found, mut first, mut last) = (None, None, None);
        block(window.bytes(place)?, at, used, &mut |entry| {
            let order = entry.name.cmp(name);
            found = found.or(order.is_eq().then_some(entry.nid));
            first = first.or(Some(order));
            last = Some(order);
            Ok(())
        })?;
        match (found, first, last) {
            (Some(nid), _, _) => return Ok(Some(nid)),
            (None, Some(std::cmp::Ordering::Greater), _) => high = middle,
            (None, _, Some(std::cmp::Ordering::Less)) => low = middle + 1,
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// What is inline in a symlink could be read as names.
fn require_directory(inode: &Inode) -> Result<(), CheckError> {
    require(inode.kind == Kind::Directory, Part::Tree, inode.at, "names are looked for in directories")
}

/// One block, of which the directory's size covers `used` bytes.
fn block(
    bytes: &[u8],
    at: u64,
    used: u64,
    visit: &mut dyn FnMut(Entry<'_>) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    let rule = |kept, rule| require(kept, Part::Directory, at, rule);
    let used = usize::try_from(used).unwrap_or(bytes.len()).min(bytes.len());
    rule(is_zero(&bytes[used..]), "behind the directory's size are zeros")?;
    let bytes = &bytes[..used];
    rule(bytes.len() >= ENTRY, "a block holds an entry")?;
    let names = usize::from(u16_at(bytes, 8));
    rule(names >= ENTRY && names.is_multiple_of(ENTRY) && names < bytes.len(), "names follow the entries")?;
    for entry in (0..names).step_by(ENTRY) {
        let start = usize::from(u16_at(bytes, entry + 8));
        let next = entry + ENTRY;
        let end = if next < names { usize::from(u16_at(bytes, next + 8)) } else { bytes.len() };
        rule(start < end && end <= bytes.len() && start >= names, "names follow each other in the block")?;
        let mut name = &bytes[start..end];
        if next == names {
            let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            rule(is_zero(&name[length..]), "behind the last name are zeros")?;
            rule(length == name.len() || used == bytes_per_block(), "the size ends with the last name")?;
            name = &name[..length];
        }
        rule((1..=NAME_MAX).contains(&name.len()), "a name has 1 to 255 bytes")?;
        rule(!name.contains(&0) && !name.contains(&b'/'), "a name has neither NUL nor slash")?;
        rule(bytes[entry + 11] == 0, "nothing in an entry's reserved byte")?;
        visit(Entry { nid: u64_at(bytes, entry), kind: bytes[entry + 10], name })?;
    }
    Ok(())
}

fn bytes_per_block() -> usize {
    usize::try_from(BLOCK).unwrap_or(usize::MAX)
}
