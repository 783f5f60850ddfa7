//! What this machine calls itself.

/// The host's name, as `uname -n` prints it.
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_machine_has_a_name() {
        assert!(!super::name().is_empty());
    }
}
