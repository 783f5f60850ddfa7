//! A scratch directory with the smallest layer image that holds a file, to find out what the kernel can do with one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::{BLOCK, RESERVED};
use crate::sys::mount::{self, DetachedErofs, Unmount};
use crate::sys::tree;

const CONTENT: &[u8] = b"a layer image can be read here\n";

/// The directory is removed when dropped.
pub(super) struct Trial {
    dir: PathBuf,
}

impl Trial {
    pub(super) fn new(root: &Path) -> io::Result<Trial> {
        // Two trials at once, of a start and of a check, must not share a name.
        let dir = root.join(format!(".probe-{}-layer", std::process::id()));
        std::fs::create_dir(&dir)?;
        let trial = Trial { dir };
        std::fs::create_dir(trial.dir.join("point"))?;
        write_image(&File::create(trial.image())?)?;
        Ok(trial)
    }

    pub(super) fn image(&self) -> PathBuf {
        self.dir.join("image.erofs")
    }

    /// Attaches the image and reads the file in it.
    pub(super) fn require_readable(&self, mounted: DetachedErofs) -> io::Result<()> {
        let point = self.dir.join("point");
        mounted.attach(File::open(&point)?)?;
        let read = std::fs::read(point.join("fs/file"));
        mount::unmount(&point, Unmount::FromSight)?;
        match read? == CONTENT {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a trial image shows other bytes than it holds",
            )),
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = tree::remove(&self.dir, &|| false) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove the probe's directory");
        }
    }
}

/// One block each of data, inodes, the image root and `fs` (the records are described in [`crate::image::check`]).
fn write_image(file: &File) -> io::Result<()> {
    let block = |number: u64| RESERVED + number * BLOCK;
    let first = u32::try_from(RESERVED / BLOCK).map_err(io::Error::other)?;
    file.set_len(block(4) + RESERVED)?;
    let mut superblock = [0; 128];
    put(&mut superblock, 0, &0xe0f5_e1e2_u32.to_le_bytes());
    superblock[12] = 12;
    put(&mut superblock, 14, &2_u16.to_le_bytes());
    put(&mut superblock, 16, &3_u64.to_le_bytes());
    put(&mut superblock, 36, &(2 * first + 4).to_le_bytes());
    put(&mut superblock, 40, &(first + 1).to_le_bytes());
    file.write_all_at(&superblock, 1024)?;
    file.write_all_at(CONTENT, block(0))?;
    // The inodes have the numbers 2, 4 and 6.
    let root = directory([(2, 2, b"."), (2, 2, b".."), (4, 2, b"fs")]);
    let fs = directory([(4, 2, b"."), (2, 2, b".."), (6, 1, b"file")]);
    let inodes = [
        inode(2, 0o040_755, 3, (root.len(), first + 2)),
        inode(4, 0o040_755, 2, (fs.len(), first + 3)),
        inode(6, 0o100_644, 1, (CONTENT.len(), first)),
    ];
    file.write_all_at(inodes.as_flattened(), block(1) + 64)?;
    file.write_all_at(&root, block(2))?;
    file.write_all_at(&fs, block(3))
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn inode(nid: u32, mode: u16, links: u32, (size, block): (usize, u32)) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    put(&mut bytes, 4, &mode.to_le_bytes());
    put(&mut bytes, 8, &(size as u64).to_le_bytes());
    put(&mut bytes, 16, &block.to_le_bytes());
    put(&mut bytes, 20, &nid.to_le_bytes());
    put(&mut bytes, 44, &links.to_le_bytes());
    bytes
}

fn directory(entries: [(u64, u8, &[u8]); 3]) -> Vec<u8> {
    let (mut bytes, mut names) = (Vec::new(), Vec::new());
    for (nid, kind, name) in entries {
        let name_at = u16::try_from(36 + names.len()).unwrap_or(u16::MAX);
        bytes.extend(nid.to_le_bytes());
        bytes.extend(name_at.to_le_bytes());
        bytes.extend([kind, 0]);
        names.extend_from_slice(name);
    }
    bytes.extend(names);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Layout;
    use crate::image::check::check;

    #[test]
    fn the_trial_image_is_a_layer_image() {
        let dir = tempfile::tempdir().unwrap();
        let trial = Trial::new(dir.path()).unwrap();
        let data = RESERVED..RESERVED + BLOCK;
        let metadata = data.end..data.end + 3 * BLOCK;
        let layout = Layout { size: metadata.end + RESERVED, data, metadata };
        assert_eq!(check(&File::open(trial.image()).unwrap(), &layout).unwrap().inodes, 2);
        drop(trial);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
