//! Which extended attributes of a layer stay, and which are refused: what `lsetxattr` answers to root, and what containerd's
//! applier makes of that (`setxattr` in `tar_unix.go`, the loop over PAX records in `tar.go`).

use super::{Body, NodeId, Tree};
use crate::image::error::{EntryFault, ImageError, Unrepresentable, shown};
use crate::image::limits::Limit;
use crate::image::tar::{Entry, Xattr};

/// The longest name and value that the kernel takes (`XATTR_NAME_MAX`, `XATTR_SIZE_MAX`).
const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 65536;
/// The most that `i_xattr_icount` can count: 12 bytes and 4 for each.
const IMAGE_MAX: u64 = 12 + 4 * 65534;

enum Verdict {
    Keep,
    /// The kernel says that it is not supported, which is passed over.
    Ignore,
    Refuse,
    Acl,
}

impl Tree<'_> {
    /// Sets the xattrs of `entry`; others that are there stay.
    pub(super) fn set_xattrs(&mut self, id: NodeId, entry: &Entry) -> Result<(), ImageError> {
        let path = entry.path.as_bytes();
        for xattr in &entry.xattrs {
            match verdict(xattr, &self.node(id).body) {
                Verdict::Keep => self.set_xattr(id, xattr.clone(), path)?,
                Verdict::Ignore => {}
                Verdict::Refuse => return Err(ImageError::entry(path, EntryFault::Xattr)),
                Verdict::Acl => return Err(unrepresentable(path, Unrepresentable::Acl)),
            }
        }
        Ok(())
    }

    /// Sets one xattr, whatever its name.
    pub(super) fn set_xattr(&mut self, id: NodeId, xattr: Xattr, path: &[u8]) -> Result<(), ImageError> {
        if xattr.name.starts_with(b"system.posix_acl_") {
            return Err(unrepresentable(path, Unrepresentable::Acl));
        }
        if xattr.value.len() > usize::from(u16::MAX) {
            return Err(unrepresentable(path, Unrepresentable::XattrValue));
        }
        self.count_metadata(8 + xattr.name.len() + xattr.value.len())?;
        let allowed = self.limits.xattrs.min(IMAGE_MAX);
        let xattrs = &mut self.node_mut(id).xattrs;
        match xattrs.binary_search_by(|present| present.name.cmp(&xattr.name)) {
            Ok(at) => xattrs[at] = xattr,
            Err(at) => xattrs.insert(at, xattr),
        }
        let size = |xattr: &Xattr| (4 + xattr.name.len() + xattr.value.len()).next_multiple_of(4) as u64;
        if 12 + xattrs.iter().map(size).sum::<u64>() > allowed {
            return Err(ImageError::limit(Limit::Xattrs, allowed));
        }
        Ok(())
    }

    pub(super) fn remove_xattr(&mut self, id: NodeId, name: &[u8]) {
        self.node_mut(id).xattrs.retain(|xattr| xattr.name != name);
    }
}

/// Whether an implied directory takes an xattr over from below. containerd passes over those of `trusted.`, and what a file system
/// does not support. An ACL is taken over, and then refused by [`Tree::set_xattr`].
pub(super) fn is_taken_over(xattr: &Xattr) -> bool {
    let prefixes = [&b"user."[..], b"security.", b"system.posix_acl_"];
    prefixes.iter().any(|prefix| xattr.name.starts_with(prefix))
}

fn unrepresentable(path: &[u8], reason: Unrepresentable) -> ImageError {
    ImageError::Unrepresentable { path: shown(path), reason }
}

fn verdict(xattr: &Xattr, body: &Body) -> Verdict {
    let Xattr { name, value } = xattr;
    if name.starts_with(b"trusted.") {
        return Verdict::Ignore;
    }
    if name.is_empty() || name.len() > NAME_MAX || value.len() > VALUE_MAX {
        return Verdict::Refuse;
    }
    let has_user_xattrs = matches!(body, Body::File { .. } | Body::Directory(_));
    let is_symlink = matches!(body, Body::Symlink(_));
    match name.as_slice() {
        b"system.posix_acl_access" | b"system.posix_acl_default" if is_symlink => Verdict::Ignore,
        b"system.posix_acl_access" | b"system.posix_acl_default" => Verdict::Acl,
        name if name.starts_with(b"user.") && !has_user_xattrs => Verdict::Ignore,
        b"user." | b"security." => Verdict::Refuse,
        b"security.capability" if !is_capability(value) => Verdict::Refuse,
        name if name.starts_with(b"user.") || name.starts_with(b"security.") => Verdict::Keep,
        _ => Verdict::Ignore,
    }
}

/// What the kernel takes for a capability (`cap_convert_nscap`, `include/uapi/linux/capability.h`): revision 2 with 20 bytes,
/// revision 3 with 24. It does not look at an empty one.
fn is_capability(value: &[u8]) -> bool {
    let revision = value.first_chunk().map(|magic| u32::from_le_bytes(*magic) & 0xff00_0000);
    match (revision, value.len()) {
        (_, 0) => true,
        (Some(revision), 20) => revision == 0x0200_0000,
        (Some(revision), 24) => revision == 0x0300_0000,
        _ => false,
    }
}
