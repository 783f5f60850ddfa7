//! What the daemon and the keeper say to each other: one JSON object a message, descriptors beside it.
//!
//! **Where.** `client` writes requests and reads answers, `process` the other way round. Pure.
//!
//! **Invariants.** [`Request::Hello`], [`Request::Upgrade`], [`Answer::Welcome`], [`Answer::OtherVersion`] and
//! [`Answer::Refused`] keep their form in every version, so that a daemon can have an older keeper upgraded. A message is
//! at most [`LONGEST_MESSAGE`] bytes long. Fields that a reader does not know are ignored, kinds of messages are not.
//!
//! **When it fails.** [`ProtocolError`] says what was wrong with a message; nothing of it was done.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The version of everything below.
pub const VERSION: u32 = 1;
/// The bytes of one message, at most.
pub const LONGEST_MESSAGE: usize = 64 << 10;
/// How many descriptors a keeper holds, at most.
pub const MOST_HELD: usize = 1024;
/// How many names one answer lists: with the longest names it is still a message.
pub const NAMES_PER_ANSWER: usize = 256;
/// The longest dead-man time: a day. A longer one would be none.
pub const LONGEST_DEAD_MAN: u64 = 86_400;

const LONGEST_NAME: usize = 128;
/// Of what a peer is told about its mistake, which may repeat its own words.
const LONGEST_DETAIL: usize = 200;

/// What a descriptor is called: 1 to 128 characters of `a-z 0-9 / . _ -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to {LONGEST_NAME} characters of a-z, 0-9, /, ., _ and -")]
pub struct NameError;

impl Name {
    /// Checks the text.
    pub fn new(text: impl Into<String>) -> Result<Name, NameError> {
        let text = text.into();
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-');
        let fits = (1..=LONGEST_NAME).contains(&text.len());
        if fits && text.bytes().all(allowed) { Ok(Name(text)) } else { Err(NameError) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Name, NameError> {
        Name::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// What a daemon asks of the keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// I am the owner now. Answered with [`Answer::Welcome`], or [`Answer::OtherVersion`] and nothing changed.
    Hello {
        /// What the daemon speaks.
        version: u32,
        /// The daemon's process, for the log.
        pid: u32,
    },
    /// Hold the descriptor beside this message; one of the same name before it is dropped.
    Put {
        /// What to call it.
        name: Name,
    },
    /// A copy of a descriptor: [`Answer::Found`] with it, or [`Answer::Missing`].
    Get {
        /// What it is called.
        name: Name,
    },
    /// Drop one: [`Answer::Done`] or [`Answer::Missing`].
    Remove {
        /// What it is called.
        name: Name,
    },
    /// What is held, in order of names.
    List {
        /// Only what comes after this name.
        after: Option<Name>,
    },
    /// What to do when no owner comes back.
    DeadMan {
        /// How long to wait, 1 to [`LONGEST_DEAD_MAN`].
        seconds: u64,
        /// The FUSE connection to abort then: N of `/sys/fs/fuse/connections/N`.
        connection: Option<u32>,
    },
    /// Nothing depends on what is held any more: drop everything.
    Release,
    /// Become the program that is installed now. The answer comes from it, or says why it was not possible. Allowed without
    /// a hello.
    Upgrade,
}

impl Request {
    /// How many descriptors come with it.
    pub fn descriptors(&self) -> usize {
        usize::from(matches!(self, Request::Put { .. }))
    }
}

/// What the keeper says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To a hello and to an upgrade.
    Welcome {
        /// What the keeper speaks.
        version: u32,
        /// The keeper's process.
        pid: u32,
        /// How many descriptors it holds.
        held: usize,
    },
    /// The keeper speaks another version; only an upgrade can be asked of it.
    OtherVersion {
        /// What it speaks.
        version: u32,
    },
    /// It is done.
    Done,
    /// The descriptor is beside this message.
    Found,
    /// Nothing is held under this name.
    Missing,
    /// What is held.
    Names {
        /// In order.
        names: Vec<Name>,
        /// Whether others come after these.
        more: bool,
    },
    /// Nothing was done.
    Refused {
        /// Why.
        reason: Refusal,
        /// The same for people.
        detail: String,
    },
}

impl Answer {
    /// A refusal with a detail of bounded length.
    pub fn refused(reason: Refusal, detail: &impl ToString) -> Answer {
        let detail = detail.to_string().chars().take(LONGEST_DETAIL).collect();
        Answer::Refused { reason, detail }
    }

    /// How many descriptors come with it.
    pub fn descriptors(&self) -> usize {
        usize::from(matches!(self, Answer::Found))
    }
}

/// Why nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The message is none that the keeper understands.
    BadRequest,
    /// It did not come from the owner.
    NotOwner,
    /// [`MOST_HELD`] descriptors are held.
    Full,
    /// The keeper could not become the installed program, and goes on as it is.
    UpgradeFailed,
    /// One that this side does not know.
    #[serde(other)]
    Other,
}

/// What is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// It is not JSON, or no message of this protocol.
    #[error("not a message: {0}")]
    NotAMessage(#[from] serde_json::Error),
    /// It came with more or fewer descriptors than it should.
    #[error("a message with {found} descriptors where {expected} belong")]
    Descriptors {
        /// What would be right.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// It would be longer than a message may be.
    #[error("a message of {0} bytes, longer than {LONGEST_MESSAGE}")]
    TooLong(usize),
    /// A number out of its range.
    #[error("a dead-man time of {0} s is not from 1 to {LONGEST_DEAD_MAN}")]
    DeadMan(u64),
}

/// A request as bytes.
pub fn encode_request(request: &Request) -> Result<Vec<u8>, ProtocolError> {
    bounded(serde_json::to_vec(request)?)
}

/// An answer as bytes.
pub fn encode_answer(answer: &Answer) -> Result<Vec<u8>, ProtocolError> {
    bounded(serde_json::to_vec(answer)?)
}

/// The request that came, with so many descriptors.
pub fn decode_request(bytes: &[u8], descriptors: usize) -> Result<Request, ProtocolError> {
    let request: Request = serde_json::from_slice(limited(bytes)?)?;
    expect(request.descriptors(), descriptors)?;
    match request {
        Request::DeadMan { seconds, .. } if !(1..=LONGEST_DEAD_MAN).contains(&seconds) => {
            Err(ProtocolError::DeadMan(seconds))
        }
        request => Ok(request),
    }
}

/// The answer that came, with so many descriptors.
pub fn decode_answer(bytes: &[u8], descriptors: usize) -> Result<Answer, ProtocolError> {
    let answer: Answer = serde_json::from_slice(limited(bytes)?)?;
    expect(answer.descriptors(), descriptors)?;
    Ok(answer)
}

fn expect(expected: usize, found: usize) -> Result<(), ProtocolError> {
    if expected == found { Ok(()) } else { Err(ProtocolError::Descriptors { expected, found }) }
}

fn limited(bytes: &[u8]) -> Result<&[u8], ProtocolError> {
    if bytes.len() > LONGEST_MESSAGE { Err(ProtocolError::TooLong(bytes.len())) } else { Ok(bytes) }
}

fn bounded(bytes: Vec<u8>) -> Result<Vec<u8>, ProtocolError> {
    limited(&bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "fuse", "journal/0123-ab.c_d", "..", &"a".repeat(128)] {
            assert_eq!(name(good).as_str(), good);
        }
        for bad in ["", "A", "a b", "a\0", "\u{e9}", "a\n", "a:b", &"a".repeat(129)] {
            assert_eq!(Name::new(bad), Err(NameError), "{bad:?}");
        }
        assert!(decode_request(br#"{"request":"put","name":"Loud"}"#, 1).is_err());
    }

    #[test]
    fn what_is_written_is_read() {
        for request in [
            Request::Hello { version: 1, pid: 7 },
            Request::Put { name: name("a") },
            Request::Get { name: name("a/b") },
            Request::Remove { name: name("a") },
            Request::List { after: Some(name("a")) },
            Request::List { after: None },
            Request::DeadMan { seconds: 100, connection: Some(51) },
            Request::Release,
            Request::Upgrade,
        ] {
            let bytes = encode_request(&request).unwrap();
            assert_eq!(decode_request(&bytes, request.descriptors()).unwrap(), request);
        }
        for answer in [
            Answer::Welcome { version: 1, pid: 7, held: 3 },
            Answer::OtherVersion { version: 2 },
            Answer::Done,
            Answer::Found,
            Answer::Missing,
            Answer::Names { names: vec![name("a")], more: true },
            Answer::refused(Refusal::Full, &"1024 are held"),
        ] {
            let bytes = encode_answer(&answer).unwrap();
            assert_eq!(decode_answer(&bytes, answer.descriptors()).unwrap(), answer);
        }
    }

    /// A keeper of another version must still understand these.
    #[test]
    fn the_frozen_messages_have_their_form() {
        let text = |request| String::from_utf8(encode_request(&request).unwrap()).unwrap();
        assert_eq!(text(Request::Hello { version: 1, pid: 7 }), r#"{"request":"hello","version":1,"pid":7}"#);
        assert_eq!(text(Request::Upgrade), r#"{"request":"upgrade"}"#);
        let text = |answer| String::from_utf8(encode_answer(&answer).unwrap()).unwrap();
        assert_eq!(
            text(Answer::Welcome { version: 1, pid: 7, held: 3 }),
            r#"{"answer":"welcome","version":1,"pid":7,"held":3}"#
        );
        assert_eq!(text(Answer::OtherVersion { version: 2 }), r#"{"answer":"other_version","version":2}"#);
        let later = br#"{"answer":"refused","reason":"of_a_later_version","detail":"x","more":[1]}"#;
        let other = Answer::Refused { reason: Refusal::Other, detail: "x".into() };
        assert_eq!(decode_answer(later, 0).unwrap(), other);
    }

    #[test]
    fn bad_messages_are_refused() {
        let long = format!(r#"{{"request":"release","x":"{}"}}"#, "a".repeat(LONGEST_MESSAGE));
        for bad in [
            "",
            "{",
            "null",
            "[]",
            "{}",
            "\u{0}",
            r#"{"request":"hello"}"#,
            r#"{"request":"hello","version":-1,"pid":1}"#,
            r#"{"request":"hello","version":4294967296,"pid":1}"#,
            r#"{"request":"mount"}"#,
            r#"{"request":"release"}{"request":"release"}"#,
            r#"{"request":"dead_man","seconds":0}"#,
            r#"{"request":"dead_man","seconds":86401}"#,
            r#"{"request":"dead_man","seconds":9,"connection":"../../x"}"#,
            long.as_str(),
        ] {
            assert!(decode_request(bad.as_bytes(), 0).is_err(), "{bad:.60}");
        }
        assert!(decode_request(b"\xff\xfe", 0).is_err());
        let nested = "[".repeat(LONGEST_MESSAGE);
        assert!(decode_request(nested.as_bytes(), 0).is_err());
    }

    #[test]
    fn descriptors_are_counted() {
        let put = br#"{"request":"put","name":"a"}"#;
        assert!(decode_request(put, 1).is_ok());
        for found in [0, 2, 16] {
            let error = decode_request(put, found).unwrap_err();
            assert!(matches!(error, ProtocolError::Descriptors { expected: 1, .. }), "{error}");
        }
        assert!(decode_request(br#"{"request":"release"}"#, 1).is_err());
        assert!(decode_answer(br#"{"answer":"found"}"#, 0).is_err());
    }

    #[test]
    fn the_longest_answers_are_messages() {
        let names = (0..NAMES_PER_ANSWER).map(|n| name(&format!("{n:0>128}"))).collect();
        encode_answer(&Answer::Names { names, more: true }).unwrap();
        let refused = Answer::refused(Refusal::BadRequest, &"\u{1}".repeat(LONGEST_MESSAGE));
        assert!(encode_answer(&refused).unwrap().len() < 2000);
    }
}
