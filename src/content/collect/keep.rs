//! Rules that say which images a store keeps.
//!
//! A rule is a pattern of names and, behind it, conditions: `registry.example/ci/* age<14d used<7d newest=5`. The first rule whose pattern matches
//! decides: the image is kept if one of the conditions holds, or if there are none. An image that no rule matches is kept.

use std::collections::HashMap;
use std::time::Duration;

use crate::content::pattern::Pattern;

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepRule {
    text: String,
    pattern: Pattern,
    /// Kept while it was published less than so many seconds ago.
    age: Option<i64>,
    /// Kept while it was used less than so many seconds ago.
    used: Option<i64>,
    /// Kept while it is one of so many of its repository and platform that were published last.
    newest: Option<usize>,
}

impl KeepRule {
    /// The rule that a text is.
    pub fn parse(text: &str) -> Result<KeepRule, String> {
        let mut words = text.split_whitespace();
        let pattern = Pattern::parse(words.next().unwrap_or_default())?;
        let mut rule = KeepRule { text: text.to_owned(), pattern, age: None, used: None, newest: None };
        for word in words {
            let twice = match word.split_once(['<', '=']) {
                Some(("age", time)) if word.contains('<') => rule.age.replace(seconds(time)?).is_some(),
                Some(("used", time)) if word.contains('<') => rule.used.replace(seconds(time)?).is_some(),
                Some(("newest", count)) if word.contains('=') => {
                    let count = count.parse().map_err(|_| format!("{count:?} is no number"))?;
                    rule.newest.replace(count).is_some()
                }
                _ => {
                    return Err(format!(
                        "{word:?} is no condition; there are age<TIME, used<TIME and newest=COUNT"
                    ));
                }
            };
            if twice {
                return Err(format!("{text:?} has a condition twice"));
            }
        }
        Ok(rule)
    }

    fn is_unconditional(&self) -> bool {
        self.age.is_none() && self.used.is_none() && self.newest.is_none()
    }

    fn holds(&self, image: &Candidate<'_>, rank: usize, now: i64) -> bool {
        let since = |then: i64, longest: Option<i64>| {
            longest.is_some_and(|longest| now.saturating_sub(then) < longest)
        };
        self.is_unconditional()
            || since(image.published, self.age)
            || since(image.used, self.used)
            || self.newest.is_some_and(|newest| rank < newest)
    }
}

/// A span of time from `14d`, `36h` or `90m`.
pub fn span(text: &str) -> Result<Duration, String> {
    seconds(text).map(|seconds| Duration::from_secs(seconds.unsigned_abs()))
}

/// The text of a span of whole minutes.
pub fn spelled(span: Duration) -> String {
    let minutes = span.as_secs() / 60;
    match minutes {
        0 => "0m".to_owned(),
        _ if minutes.is_multiple_of(24 * 60) => format!("{}d", minutes / (24 * 60)),
        _ if minutes.is_multiple_of(60) => format!("{}h", minutes / 60),
        _ => format!("{minutes}m"),
    }
}

/// `14d`, `36h` or `90m`.
fn seconds(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no time, such as 14d, 36h or 90m");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let number = &text[..text.len() - unit.len_utf8()];
    let factor = match unit {
        'd' => 24 * 3600,
        'h' => 3600,
        'm' => 60,
        _ => return Err(wrong()),
    };
    let number: i64 = match number.bytes().all(|b| b.is_ascii_digit()) {
        true => number.parse().map_err(|_| wrong())?,
        false => return Err(wrong()),
    };
    number.checked_mul(factor).ok_or_else(wrong)
}

/// An image that rules judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate<'a> {
    pub(super) reference: &'a str,
    pub(super) platform: &'a str,
    /// When its name was written last, seconds since 1970.
    pub(super) published: i64,
    /// When it was used last.
    pub(super) used: i64,
}

/// For each image why it goes, or `None` if it stays.
pub(super) fn judge(rules: &[KeepRule], images: &[Candidate<'_>], now: i64) -> Vec<Option<String>> {
    let of = |image: &Candidate<'_>| rules.iter().position(|rule| rule.pattern.matches(image.reference));
    let ruled: Vec<Option<usize>> = images.iter().map(of).collect();
    let mut by_age: Vec<usize> = (0..images.len()).collect();
    by_age.sort_by_key(|at| (-images[*at].published, images[*at].reference));
    let mut seen: HashMap<(Option<usize>, &str, &str), usize> = HashMap::new();
    let mut ranks = vec![0; images.len()];
    for at in by_age {
        let image = &images[at];
        let family = seen.entry((ruled[at], repository(image.reference), image.platform)).or_default();
        ranks[at] = *family;
        *family += 1;
    }
    let verdict = |at: usize| {
        let rule = &rules[ruled[at]?];
        let goes = !rule.holds(&images[at], ranks[at], now);
        goes.then(|| format!("the rule {:?} does not keep it", rule.text))
    };
    (0..images.len()).map(verdict).collect()
}

/// A reference without its tag and digest.
pub(crate) fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or_default();
    let tag = name.rfind(':').filter(|at| !name[*at..].contains('/'));
    &name[..tag.unwrap_or(name.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        for bad in [
            "",
            "* age",
            "* age=1d",
            "* age<1",
            "* age<1y",
            "* used<-1d",
            "* newest<3",
            "* newest=x",
            "* age<1d age<2d",
            "* age<99999999999999999999d",
            "* or",
            "* age<\u{e9}",
        ] {
            assert!(KeepRule::parse(bad).is_err(), "{bad:?}");
        }
        assert!(KeepRule::parse("r.example/* age<14d used<36h newest=3").is_ok());
    }

    #[test]
    fn a_span_is_spelled_as_it_is_read() {
        for text in ["0m", "90m", "36h", "47h", "2d", "14d"] {
            assert_eq!(spelled(span(text).unwrap()), text);
        }
        assert_eq!(spelled(span("48h").unwrap()), "2d");
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let day = 24 * 3600;
        let rules: Vec<KeepRule> = ["r.example/ci/base:* ", "r.example/ci/* age<14d used<7d newest=1"]
            .map(|text| KeepRule::parse(text).unwrap())
            .into();
        let image = |reference, published: i64, used: i64| Candidate {
            reference,
            platform: "linux/amd64",
            published: (100 - published) * day,
            used: (100 - used) * day,
        };
        let images = [
            image("r.example/ci/base:1", 90, 90),
            image("r.example/ci/a:3", 20, 20),
            image("r.example/ci/a:2", 30, 6),
            image("r.example/ci/a:1", 30, 8),
            image("r.example/ci/b:1", 13, 13),
            image("r.example/ci/b:0", 15, 15),
            image("other.example/x:1", 99, 99),
        ];
        let goes: Vec<bool> = judge(&rules, &images, 100 * day).iter().map(Option::is_some).collect();
        assert_eq!(goes, [false, false, false, true, false, true, false]);
        assert_eq!(judge(&[], &images, 100 * day), vec![None; 7]);
    }

    #[test]
    fn a_repository_is_a_name_without_tag_and_digest() {
        for (reference, expected) in [
            ("r.example:5000/a:1", "r.example:5000/a"),
            ("r.example:5000/a", "r.example:5000/a"),
            ("r.example/a:1@sha256:00", "r.example/a"),
        ] {
            assert_eq!(repository(reference), expected);
        }
    }
}
