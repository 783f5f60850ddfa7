//! Memory of this process: pages that stay, files that are only memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use rustix::fs::MemfdFlags;
use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Keeps every page of this process in memory, those of its program too (mlockall(2)): whatever happens to the disk below, it
/// answers. Where the limits do not allow that, a warning says so and the process works as others do.
pub fn lock_all() {
    let may_grow = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_ok();
    // Under a limit, to lock future pages would mean that memory is refused when it is reached.
    let flags = match may_grow {
        true => MlockAllFlags::CURRENT | MlockAllFlags::FUTURE,
        false => MlockAllFlags::CURRENT,
    };
    if let Err(error) = rustix::mm::mlockall(flags) {
        tracing::warn!(
            %error,
            "cannot lock this process in memory; it works, but needs the disk of its program when memory is short \
             (LimitMEMLOCK=infinity of its unit, or ulimit -l unlimited, would allow it)"
        );
    }
}

/// Keeps what this process has mapped by now in memory as it is used: its program, its libraries, what it began with. Not what it
/// allocates later: that is most of it, and pages that are locked cannot be given back one by one. Where the limits do not allow
/// it, a line says so.
///
/// Why: what containers wait for must not wait for the disk of the program, which is slowest when memory is short.
pub fn lock_program() {
    // If it may not be raised, the capability or the limit that is there may do.
    let raised = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_ok();
    if let Err(error) = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT) {
        tracing::info!(%error, raised, "the program is not locked in memory (LimitMEMLOCK=infinity of the unit would allow it)");
    }
}

/// Gives memory that is allocated no more back to the kernel, which glibc otherwise keeps for what may come: chunks on their way take
/// some 100 MB, for as long as they are on it. Takes some milliseconds.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and locks the allocator itself (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A file without a name and without a disk, with these bytes, read from its beginning; closed on exec. `name` is for people
/// who look into `/proc`.
pub fn file(name: &str, bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Pieces that glibc would keep: smaller than what it maps one by one, and with others that stay between them.
    #[test]
    #[cfg(target_env = "gnu")]
    fn what_is_freed_goes_back_to_the_kernel() {
        let mut pieces: Vec<Vec<u8>> = (0..2000).map(|_| vec![1; 100_000]).collect();
        let full = resident();
        let mut number = 0;
        pieces.retain(|_| {
            number += 1;
            number % 100 == 0
        });
        give_back();
        // Others of this process allocate meanwhile.
        assert!(resident() + 100_000_000 < full, "{} of {full}", resident());
        assert_eq!(pieces.len(), 20);
    }

    #[test]
    fn a_memory_file_is_read_from_its_beginning() {
        let mut text = String::new();
        file("test", b"what is kept").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "what is kept");
    }
}
