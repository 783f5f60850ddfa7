//! containerd's filter language: which snapshots a `List` call asks for.
//!
//! Where: `service` hands the strings of a request to [`Filter::parse`], the metadata store asks
//! [`Filter::matches`] for each snapshot. Pure: no I/O, no clock, no global state. The grammar is that of
//! containerd's `pkg/filters`, read from its source and compared with it on generated input:
//!
//! ```text
//! filter     := selector ("," selector)*          all selectors must match
//! selector   := fieldpath [operator value]        no operator: is the field present?
//! fieldpath  := field ("." field)*
//! field      := "quoted" | [A-Za-z0-9_]+
//! operator   := "==" | "!=" | "~="
//! value      := quoted | a run of graphic characters other than space and comma
//! quoted     := "..." with Go's escapes; as the value of ~= also /.../ and |...|
//! ```
//!
//! Several expressions are alternatives: one of them must match. No expression at all, or an empty one, means
//! everything. White space is allowed before a token and nowhere else, so `name == x` parses while `name==x `
//! does not; that is containerd's reading too.
//!
//! The fields of a snapshot, as containerd names them: `name` and `parent` (always present; `parent` may be
//! empty), `kind` (`active`, `view`, `committed`), and `labels.<key>`, where the key is the rest of the path
//! joined with dots, so that `labels."containerd.io/gc.root"` and `labels.a.b` both name a label.
//!
//! Words: a *subject* is the thing being matched; a *selector* is one condition on one field.
//!
//! Invariants:
//! 1. No input panics, whatever it holds.
//! 2. `==` needs the field to be present; `!=` and `~=` read an absent field as the empty string.
//! 3. A regular expression that does not compile matches nothing and is not an error, as in containerd.
//! 4. Memory is bounded: by the length of the input, the number of selectors and the size of each compiled
//!    pattern. Filters come from clients and are not trusted.
//!
//! When it fails: [`FilterError`] names the expression, the byte where it went wrong and why; nothing is kept.

use std::borrow::Cow;
use std::fmt;
use std::sync::LazyLock;

use regex::Regex;

mod pattern;

/// Longest input accepted, all expressions of one request together.
///
/// A 32 KiB key written entirely in `\U0010ffff` escapes still fits.
const MAX_LENGTH: usize = 1 << 20;
/// Most expressions and selectors of one request.
const MAX_SELECTORS: usize = 16 * 1024;
/// Most fields in one path.
const MAX_FIELDS: usize = 16 * 1024;
/// Most regular expressions of one request; each may hold up to [`pattern::SIZE_LIMIT`] once compiled.
const MAX_PATTERNS: usize = 16;

/// A parsed filter: alternatives of conjunctions.
#[derive(Debug, Clone)]
pub struct Filter(Vec<Vec<Selector>>);

/// What a filter looks at: a thing with named fields.
pub trait Subject {
    /// The value of the field at `path` (never empty), or `None` when the subject has no such field.
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>>;
}

/// An expression that is not in the language.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct FilterError {
    /// The whole expression.
    pub expression: String,
    /// The byte in it where parsing stopped; its length when the end came too early.
    pub position: usize,
    /// What was wrong there.
    pub message: String,
}

/// How much of a long expression is shown on each side of the mistake.
const SHOWN: usize = 60;

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = floor_boundary(&self.expression, self.position);
        let before = &self.expression[..at];
        let mut rest = self.expression[at..].chars();
        let start = floor_boundary(before, before.len().saturating_sub(SHOWN));
        let lead = if start > 0 { "..." } else { "" };
        write!(f, "invalid filter [{lead}{}", Printable(&before[start..]))?;
        if let Some(wrong) = rest.next() {
            let after = rest.as_str();
            let end = floor_boundary(after, SHOWN);
            let tail = if end < after.len() { "..." } else { "" };
            let (wrong, after) = (wrong.to_string(), &after[..end]);
            write!(f, " >|{}|< {}{tail}", Printable(&wrong), Printable(after))?;
        }
        write!(f, "] at byte {}: {}", self.position, self.message)
    }
}

/// Text with its control characters escaped, so that an error stays on one line of a log.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// The last character boundary at or before `index`.
fn floor_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

impl Filter {
    /// Parses the expressions of one request.
    pub fn parse(expressions: &[String]) -> Result<Filter, FilterError> {
        let mut budget = Budget::default();
        let mut alternatives = Vec::new();
        let mut everything = expressions.is_empty();
        for expression in expressions {
            budget.spend(expression)?;
            if expression.is_empty() {
                // The others are still parsed: a mistake is reported wherever it stands.
                everything = true;
                continue;
            }
            alternatives.push(Parser::new(expression, &mut budget).selectors()?);
        }
        if everything {
            alternatives = vec![Vec::new()];
        }
        Ok(Filter(alternatives))
    }

    /// Whether `subject` is one of those the filter asks for.
    pub fn matches(&self, subject: &impl Subject) -> bool {
        self.0.iter().any(|all| all.iter().all(|one| one.matches(subject)))
    }

    /// Whether every subject matches, so that a caller need not build subjects at all.
    pub fn is_everything(&self) -> bool {
        self.0.iter().any(Vec::is_empty)
    }
}

/// One condition.
#[derive(Debug, Clone)]
struct Selector {
    /// `None` for a path with bytes that are not UTF-8: no subject has such a field.
    path: Option<Vec<String>>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    // Bytes, because a quoted value can spell out any byte: "\xff" is legal and equals nothing.
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// `None` for a pattern that does not compile.
    Matches(Option<Regex>),
}

impl Selector {
    fn matches(&self, subject: &impl Subject) -> bool {
        let value = self.path.as_ref().and_then(|path| subject.field(path));
        let text = value.as_deref().unwrap_or("");
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some() && text.as_bytes() == wanted.as_slice(),
            Test::NotEqual(unwanted) => text.as_bytes() != unwanted.as_slice(),
            Test::Matches(regex) => regex.as_ref().is_some_and(|regex| regex.is_match(text)),
        }
    }
}

/// What one request may still use.
struct Budget {
    length: usize,
    selectors: usize,
    patterns: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { length: MAX_LENGTH, selectors: MAX_SELECTORS, patterns: MAX_PATTERNS }
    }
}

impl Budget {
    /// Accounts for one more expression.
    fn spend(&mut self, expression: &str) -> Result<(), FilterError> {
        let refuse = |message: String| FilterError {
            // The text is what there is too much of, so it is not carried along.
            expression: expression.chars().take(SHOWN).collect(),
            position: 0,
            message,
        };
        let Some(length) = self.length.checked_sub(expression.len()) else {
            return Err(refuse(format!("filters are longer than {MAX_LENGTH} bytes")));
        };
        self.length = length;
        if !take_one(&mut self.selectors) {
            return Err(refuse(format!("more than {MAX_SELECTORS} filters and selectors")));
        }
        Ok(())
    }
}

/// Takes one from a counter; false when nothing is left.
fn take_one(counter: &mut usize) -> bool {
    let left = counter.checked_sub(1);
    *counter = left.unwrap_or(0);
    left.is_some()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Matches,
}

/// A recursive-descent parser without recursion: the language has no nesting.
struct Parser<'a> {
    input: &'a str,
    at: usize,
    budget: &'a mut Budget,
}

impl<'a> Parser<'a> {
    fn new(input: &'a str, budget: &'a mut Budget) -> Self {
        Parser { input, at: 0, budget }
    }

    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut all = vec![self.selector()?];
        while let Some(c) = self.peek() {
            if c != ',' {
                let message = format!("unexpected input {c:?}, expected a comma or the end");
                return Err(self.error(self.at, message));
            }
            self.next();
            if !take_one(&mut self.budget.selectors) {
                let message = format!("more than {MAX_SELECTORS} filters and selectors");
                return Err(self.error(self.at, message));
            }
            all.push(self.selector()?);
        }
        Ok(all)
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let path = self.field_path()?;
        if matches!(self.peek(), None | Some(',')) {
            let test = Test::Present;
            return Ok(Selector { path, test });
        }
        let operator = self.operator()?;
        let value_at = self.at;
        let value = self.value(operator)?;
        let test = match operator {
            Operator::Equal => Test::Equal(value),
            Operator::NotEqual => Test::NotEqual(value),
            Operator::Matches => {
                if !take_one(&mut self.budget.patterns) {
                    let message = format!("more than {MAX_PATTERNS} regular expressions");
                    return Err(self.error(value_at, message));
                }
                let text = String::from_utf8(value).ok();
                Test::Matches(text.and_then(|text| pattern::compile(&text)))
            }
        };
        Ok(Selector { path, test })
    }

    /// Fields joined by dots; `None` when one of them is not UTF-8 once unquoted.
    fn field_path(&mut self) -> Result<Option<Vec<String>>, FilterError> {
        let mut path = Some(Vec::new());
        let mut count = 0;
        loop {
            let field_at = self.at;
            let field = String::from_utf8(self.field()?).ok();
            path = path.zip(field).map(|(mut path, field)| {
                path.push(field);
                path
            });
            count += 1;
            if count > MAX_FIELDS {
                let message = format!("more than {MAX_FIELDS} fields in a path");
                return Err(self.error(field_at, message));
            }
            // The dot follows at once; a space before it ends the path.
            if self.peek() != Some('.') {
                return Ok(path);
            }
            self.next();
        }
    }

    fn field(&mut self) -> Result<Vec<u8>, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') => Err(self.alternative_quote()),
            Some(c) if is_field(c) => {
                let start = self.at;
                while self.peek().is_some_and(is_field) {
                    self.next();
                }
                Ok(self.input.as_bytes()[start..self.at].to_vec())
            }
            _ => Err(self.expected("a field name or a quoted string")),
        }
    }

    fn operator(&mut self) -> Result<Operator, FilterError> {
        self.skip_space();
        let start = self.at;
        while matches!(self.peek(), Some('=' | '!' | '~')) {
            self.next();
        }
        match &self.input[start..self.at] {
            "==" => Ok(Operator::Equal),
            "!=" => Ok(Operator::NotEqual),
            "~=" => Ok(Operator::Matches),
            "" => Err(self.expected("an operator (== or != or ~=)")),
            other => {
                let message = format!("unsupported operator {:?}", shorten(other));
                Err(self.error(start, message))
            }
        }
    }

    fn value(&mut self, operator: Operator) -> Result<Vec<u8>, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if operator == Operator::Matches => self.quoted(),
            Some('/' | '|') => Err(self.alternative_quote()),
            None | Some(',' | '.' | '=' | '!' | '~' | '\0' | char::REPLACEMENT_CHARACTER) => {
                Err(self.expected("a value or a quoted string"))
            }
            Some(_) => {
                // containerd takes the first character whatever it is and checks only the following ones.
                let start = self.at;
                self.next();
                while self.peek().is_some_and(is_value) {
                    self.next();
                }
                Ok(self.input.as_bytes()[start..self.at].to_vec())
            }
        }
    }

    /// A quoted string; its delimiter is the next character.
    fn quoted(&mut self) -> Result<Vec<u8>, FilterError> {
        let start = self.at;
        let quote = self.next();
        let mut out = Vec::new();
        loop {
            match self.peek() {
                None | Some('\n') => return Err(self.error(start, "quoted literal not terminated")),
                Some('\0' | char::REPLACEMENT_CHARACTER) => {
                    return Err(self.expected("a character that may stand in a quoted literal"));
                }
                Some('\\') => self.escape(quote, &mut out)?,
                next if next == quote => {
                    self.next();
                    return Ok(out);
                }
                Some(c) => {
                    self.next();
                    push_char(&mut out, c);
                }
            }
        }
    }

    /// One escape sequence of a Go string.
    fn escape(&mut self, quote: Option<char>, out: &mut Vec<u8>) -> Result<(), FilterError> {
        let start = self.at;
        self.next();
        let c = self.next();
        match c {
            Some('a') => out.push(0x07),
            Some('b') => out.push(0x08),
            Some('f') => out.push(0x0c),
            Some('n') => out.push(b'\n'),
            Some('r') => out.push(b'\r'),
            Some('t') => out.push(b'\t'),
            Some('v') => out.push(0x0b),
            Some('\\') => out.push(b'\\'),
            Some('x') => {
                let value = self.digits(start, 0, 16, 2)?;
                out.push(u8::try_from(value).map_err(|_| self.bad_number(start))?);
            }
            Some(c @ '0'..='7') => {
                let value = self.digits(start, u32::from(c) - u32::from('0'), 8, 2)?;
                out.push(u8::try_from(value).map_err(|_| self.bad_number(start))?);
            }
            Some(c @ ('u' | 'U')) => {
                let value = self.digits(start, 0, 16, if c == 'u' { 4 } else { 8 })?;
                if value > u32::from(char::MAX) {
                    return Err(self.bad_number(start));
                }
                // Half of a surrogate pair is no character; Go writes the replacement character for it.
                let c = char::from_u32(value).unwrap_or(char::REPLACEMENT_CHARACTER);
                push_char(out, c);
            }
            Some(c) if Some(c) == quote => push_char(out, c),
            _ => return Err(self.error(start, "illegal escape sequence")),
        }
        Ok(())
    }

    /// Exactly `count` digits, appended to `value`.
    fn digits(&mut self, start: usize, mut value: u32, base: u32, count: usize) -> Result<u32, FilterError> {
        for _ in 0..count {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(base)) else {
                return Err(self.bad_number(start));
            };
            self.next();
            // Eight hexadecimal digits fill the type exactly, so nothing is lost.
            value = value.wrapping_mul(base).wrapping_add(digit);
        }
        Ok(value)
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn peek(&self) -> Option<char> {
        self.input[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn bad_number(&self, start: usize) -> FilterError {
        self.error(start, "illegal numeric escape sequence")
    }

    fn alternative_quote(&self) -> FilterError {
        let message = "this quote is only for the value of ~=, use \"...\" here";
        self.error(self.at, message)
    }

    fn expected(&self, what: &str) -> FilterError {
        let message = match self.peek() {
            None => format!("unexpected end, expected {what}"),
            Some('\0') => format!("unexpected null, expected {what}"),
            Some(char::REPLACEMENT_CHARACTER) => {
                format!("invalid character (U+FFFD), expected {what}")
            }
            Some(_) => format!("expected {what}"),
        };
        self.error(self.at, message)
    }

    fn error(&self, position: usize, message: impl Into<String>) -> FilterError {
        FilterError { expression: self.input.to_owned(), position, message: message.into() }
    }
}

fn push_char(out: &mut Vec<u8>, c: char) {
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// The beginning of a text that may be very long.
fn shorten(text: &str) -> &str {
    &text[..floor_boundary(text, SHOWN)]
}

fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// Go's "graphic" without space and comma: letters, marks, numbers, punctuation and symbols.
fn is_value(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_graphic() && c != ',';
    }
    static GRAPHIC: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"^[\p{L}\p{M}\p{N}\p{P}\p{S}]$").ok());
    // U+FFFD is what broken UTF-8 is read as; containerd stops there.
    c != char::REPLACEMENT_CHARACTER
        && GRAPHIC.as_ref().is_some_and(|graphic| graphic.is_match(c.encode_utf8(&mut [0; 4])))
}

#[cfg(test)]
mod tests;
