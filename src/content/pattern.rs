//! Patterns of image names: `*` stands for any text, slashes included, and `?` for one character; matched with the whole name, tag
//! included.

/// The longest pattern, in bytes.
const LONGEST: usize = 1024;

/// A pattern of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern that a text is.
    pub fn parse(text: &str) -> Result<Pattern, String> {
        if text.is_empty()
            || text.len() > LONGEST
            || text.chars().any(|c| c.is_control() || c.is_whitespace())
        {
            return Err(format!("{text:?} is no pattern of image names, such as \"docker.io/library/*\""));
        }
        Ok(Pattern(text.to_owned()))
    }

    /// Whether it is this name's.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        // Where to go on if what follows the last star does not match: the star takes one character more.
        let mut back: Option<(usize, usize)> = None;
        while n < name.len() {
            if pattern.get(p) == Some(&'*') {
                back = Some((p + 1, n));
                p += 1;
            } else if pattern.get(p).is_some_and(|c| *c == '?' || *c == name[n]) {
                (p, n) = (p + 1, n + 1);
            } else if let Some((after, taken)) = back {
                (p, n) = (after, taken + 1);
                back = Some((after, taken + 1));
            } else {
                return false;
            }
        }
        pattern[p..].iter().all(|c| *c == '*')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_matched_with_whole_names() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "r.example/a:1", true),
            ("r.example/*", "r.example/a/b:1", true),
            ("r.example/*", "other.example/r.example/a", false),
            ("*:1", "r.example/a:1", true),
            ("*:1", "r.example/a:11", false),
            ("*a*b*", "xxaxxbxb", true),
            ("*a*b", "xxaxxbxa", false),
            ("r.example/a:?", "r.example/a:1", true),
            ("r.example/a:?", "r.example/a:12", false),
            ("r.example/a:1", "r.example/a:1", true),
            ("", "x", false),
        ] {
            let Ok(pattern) = Pattern::parse(pattern) else {
                assert!(pattern.is_empty());
                continue;
            };
            assert_eq!(pattern.matches(name), expected, "{pattern:?} {name}");
        }
    }

    /// A pattern with many stars took time that doubles with each of them.
    #[test]
    fn many_stars_are_no_work() {
        let pattern = Pattern::parse(&format!("{}b", "a*".repeat(200))).unwrap();
        assert!(!pattern.matches(&"a".repeat(1000)));
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for bad in ["", "a b", "a\n", &"a".repeat(LONGEST + 1)] {
            assert!(Pattern::parse(bad).is_err(), "{bad:?}");
        }
    }
}
