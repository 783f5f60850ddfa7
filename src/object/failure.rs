//! What an error of the store means: is it worth another attempt, and what is the user told?
//!
//! The crate below keeps the HTTP status and the server's answer in its messages only. So they are read from there, and
//! nothing of the message is passed on but the status and the `Code` and `Message` of S3's error document: the rest may hold
//! signatures and tokens.

use std::error::Error as StdError;
use std::io;

use object_store::Error;
use object_store::client::HttpError;

use super::ObjectError;

/// The longest piece of somebody else's text in a message of ours.
const LONGEST: usize = 200;

/// Why one request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The store has answered, and will answer the same again.
    Final(ObjectError),
    /// The way to the store or the store itself failed: another attempt may succeed.
    Transient(String),
    /// The caller's time was over before anything could be said about the store.
    TooSoon(String),
}

impl From<tokio::task::JoinError> for Failure {
    fn from(error: tokio::task::JoinError) -> Failure {
        Failure::Transient(error.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        if let Some(failure) = chain(&error).find_map(|e| e.downcast_ref::<io::Error>()).and_then(of_io) {
            return failure;
        }
        let text = error.to_string();
        let code = tag(&text, "Code");
        let told = told(&error, &text);
        let http = status(&text);
        match (&error, code, http) {
            (_, Some("QuotaExceeded" | "XMinioStorageFull"), _) | (_, _, Some(507)) => {
                Failure::Final(ObjectError::Full(told))
            }
            // The wire has spoilt the request.
            (_, Some("BadDigest" | "IncompleteBody" | "RequestTimeout" | "XAmzContentSHA256Mismatch"), _) => {
                Failure::Transient(told)
            }
            (_, Some("ExpiredToken" | "InvalidAccessKeyId" | "RequestTimeTooSkewed" | "AuthFailure"), _) => {
                Failure::Final(ObjectError::Denied(told))
            }
            (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _, _) => {
                Failure::Final(ObjectError::Denied(told))
            }
            // The bucket lives elsewhere.
            (Error::Generic { .. }, _, None) if text.contains("redirect without LOCATION") => {
                Failure::Final(ObjectError::Rejected(told))
            }
            // Two writers of one name at once, for stores that have it.
            (Error::AlreadyExists { .. } | Error::Precondition { .. }, _, _) => Failure::Transient(told),
            (Error::Generic { .. }, _, Some(408 | 429 | 500 | 502..=599) | None) => Failure::Transient(told),
            (Error::JoinError { .. }, _, _) => Failure::Transient(told),
            _ => Failure::Final(ObjectError::Rejected(told)),
        }
    }
}

/// Whether "not found" is said of the store and not of the object.
pub(super) fn is_no_such_store(error: &Error) -> bool {
    let text = error.to_string();
    matches!(tag(&text, "Code"), Some("NoSuchBucket" | "ContainerNotFound"))
        || text.contains("bucket does not exist")
}

/// What a local file system answers.
pub(super) fn of_io(error: &io::Error) -> Option<Failure> {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => {
            Some(Failure::Final(ObjectError::Full(error.to_string())))
        }
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            Some(Failure::Final(ObjectError::Denied(error.to_string())))
        }
        Kind::NotADirectory | Kind::IsADirectory | Kind::InvalidFilename => {
            Some(Failure::Final(ObjectError::Rejected(error.to_string())))
        }
        _ => None,
    }
}

fn chain<'a>(error: &'a Error) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(error.source(), |e| (*e).source())
}

/// One line for people.
fn told(error: &Error, text: &str) -> String {
    if let Some(http) = status(text) {
        let parts = [tag(text, "Code"), tag(text, "Message")].into_iter().flatten();
        let detail = parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
        return shortened(format!("HTTP {http} {detail}").trim());
    }
    if chain(error).any(|e| e.is::<HttpError>()) {
        // The outer messages repeat the inner ones; the innermost says what happened.
        let last = chain(error).last().map(ToString::to_string).unwrap_or_default();
        let kind = chain(error).find_map(|e| e.downcast_ref::<HttpError>()).map(HttpError::kind);
        return shortened(&kind.map_or(last.clone(), |kind| format!("{last} ({kind:?})")));
    }
    shortened(text)
}

/// The status in a message of the crate below.
fn status(text: &str) -> Option<u16> {
    let (_, after) = text.split_once("non-2xx status code: ")?;
    after.get(..3)?.parse().ok()
}

/// The text of an element of S3's error document, or what stands for it in Azure's.
fn tag<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, after) = text.split_once(&format!("<{name}>"))?;
    after.split_once("</").map(|(inside, _)| inside)
}

/// One line of bounded length, without the queries of URLs: signatures are there.
fn shortened(text: &str) -> String {
    let mut short = String::new();
    let mut query = false;
    for c in text.chars() {
        match c {
            '?' => query = true,
            _ if c.is_whitespace() || matches!(c, ')' | '"' | '\'') => query = false,
            _ => {}
        }
        if !query {
            short.push(if c.is_control() { ' ' } else { c });
        }
        if short.len() >= LONGEST {
            short.push('…');
            break;
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Error {
        Error::Generic { store: "S3", source: text.to_owned().into() }
    }

    fn answered(status: &str, code: &str) -> Error {
        generic(&format!(
            "Error performing PUT http://host/b/k?sig=SECRET in 1ms - Server returned non-2xx status code: {status}: \
             <?xml?><Error><Code>{code}</Code><Message>Told you</Message><Token>SECRET</Token></Error>"
        ))
    }

    #[test]
    fn answers_are_told_apart() {
        let transient = [
            answered("500 Internal Server Error", "InternalError"),
            answered("503 Slow Down", "SlowDown"),
            answered("429 Too Many", "TooMany"),
            answered("400 Bad Request", "IncompleteBody"),
            generic("connection reset"),
            Error::AlreadyExists { path: "x".into(), source: "409".into() },
        ];
        for error in transient {
            let text = error.to_string();
            assert!(matches!(Failure::from(error), Failure::Transient(_)), "{text}");
        }
        for (status, code) in [
            ("400 Bad Request", "InvalidArgument"),
            ("301 Moved", "PermanentRedirect"),
            ("501 No", "NotImplemented"),
        ] {
            let failure = Failure::from(answered(status, code));
            assert!(matches!(&failure, Failure::Final(ObjectError::Rejected(_))), "{failure:?}");
        }
        for (status, code) in [("507 Insufficient Storage", ""), ("403 Forbidden", "QuotaExceeded")] {
            let failure = Failure::from(answered(status, code));
            assert!(matches!(&failure, Failure::Final(ObjectError::Full(_))), "{failure:?}");
        }
        let denied = Error::PermissionDenied { path: "x".into(), source: "no".into() };
        assert!(matches!(Failure::from(denied), Failure::Final(ObjectError::Denied(_))));
    }

    /// Ceph's gateway says nothing beside the code: "HTTP 403 SignatureDoesNotMatch:".
    #[test]
    fn a_code_without_a_message_stands_alone() {
        let text = "non-2xx status code: 400 Bad Request: <Error><Code>Odd</Code><Message></Message></Error>";
        let failure = Failure::from(generic(text));
        assert!(
            matches!(&failure, Failure::Final(ObjectError::Rejected(told)) if told == "HTTP 400 Odd"),
            "{failure:?}"
        );
    }

    #[test]
    fn errno_of_a_directory_keeps_its_meaning() {
        let of = |errno| {
            let source: Box<dyn StdError + Send + Sync> = Box::new(io::Error::from_raw_os_error(errno));
            Failure::from(Error::Generic { store: "LocalFileSystem", source })
        };
        // ENOSPC, EDQUOT; EACCES, EROFS; EIO
        assert!(matches!(of(28), Failure::Final(ObjectError::Full(_))));
        assert!(matches!(of(122), Failure::Final(ObjectError::Full(_))));
        assert!(matches!(of(13), Failure::Final(ObjectError::Denied(_))));
        assert!(matches!(of(30), Failure::Final(ObjectError::Denied(_))));
        assert!(matches!(of(5), Failure::Transient(_)));
    }

    #[test]
    fn messages_hold_no_secrets_and_are_short() {
        let error = Failure::from(answered("500 Internal Server Error", "InternalError"));
        let Failure::Transient(told) = error else { panic!() };
        assert_eq!(told, "HTTP 500 InternalError: Told you");
        let url = format!("GET https://h/c/k?sv=1&sig=SECRET failed\n{}", "x".repeat(500));
        let Failure::Transient(told) = Failure::from(generic(&url)) else { panic!() };
        assert!(!told.contains("SECRET") && !told.contains('\n') && told.len() < LONGEST + 10, "{told}");
    }
}
