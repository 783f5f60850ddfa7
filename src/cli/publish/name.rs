//! Names of images as people write them, and as containerd keeps them.

/// The full reference that a short one stands for: `alpine` is `docker.io/library/alpine:latest`.
///
/// Source: the reference implementation's `ParseDockerRef` (distribution/reference), which nerdctl and CRI use. A full reference
/// stays as it is.
pub(super) fn full(name: &str) -> String {
    let mut full = String::new();
    match name.split_once('/') {
        None => full.push_str("docker.io/library/"),
        Some((first, _)) if first != "localhost" && !first.contains(['.', ':']) => {
            full.push_str("docker.io/")
        }
        Some(_) => {}
    }
    full.push_str(name);
    let last = full.rsplit('/').next().unwrap_or_default();
    if !last.contains([':', '@']) {
        full.push_str(":latest");
    }
    full
}

/// Up to three of `names` that somebody may have meant by `wanted`, the likeliest first.
pub(super) fn similar<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    // What all names have in common makes none of them likely.
    let own = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        name.strip_prefix("library/").unwrap_or(name).to_owned()
    };
    let wanted = own(&full(wanted));
    let mut scored: Vec<(f64, &str)> = names
        .into_iter()
        // CRI keeps each image under its digest as well: nobody means that by a name.
        .filter(|name| !name.starts_with("sha256:"))
        .map(|name| (strsim::normalized_damerau_levenshtein(&wanted, &own(name)), name))
        .filter(|(score, _)| *score > 0.6)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_is_made_full() {
        for (short, long) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3.22", "docker.io/library/alpine:3.22"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:1", "localhost:5000/app:1"),
            ("registry.example/a/b", "registry.example/a/b:latest"),
            ("registry.example:443/a/b", "registry.example:443/a/b:latest"),
            ("registry.example/a@sha256:00", "registry.example/a@sha256:00"),
            ("docker.io/library/alpine:latest", "docker.io/library/alpine:latest"),
        ] {
            assert_eq!(full(short), long);
        }
    }

    #[test]
    fn what_was_meant_is_found() {
        let names = [
            "docker.io/library/alpine:3.22",
            "docker.io/library/alpine:3.21",
            "registry.example/x:1",
            "sha256:00",
        ];
        assert_eq!(similar("alpine:3.23", names).len(), 2);
        assert_eq!(similar("alpin:3.22", names)[0], "docker.io/library/alpine:3.22");
        assert!(similar("postgres", names).is_empty());
    }
}
