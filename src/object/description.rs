//! `speedy.json`: read once, at the first use of a store, so that a store that cannot be reached keeps nobody from starting.

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::layout::{Description, FORMAT, STORE};
use super::{Handle, ObjectError, Objects};

/// No description has more bytes.
pub(super) const LONGEST: u64 = 64 * 1024;
/// A store without description is empty. How long a reader believes that.
const EMPTY_FOR: std::time::Duration = std::time::Duration::from_secs(30);

/// What somebody is about to do with the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// What is known of the description.
#[derive(Debug, Default)]
pub(super) enum Known {
    #[default]
    Nothing,
    /// There was none then.
    Absent(Instant),
    /// One of a format we know; with it, why we may not write, if we may not.
    Present(Option<ObjectError>),
}

impl Known {
    /// Whether `access` may go on; `None` if the store has to be asked.
    fn verdict(&self, access: Access) -> Option<Result<(), ObjectError>> {
        match (self, access) {
            (Known::Present(Some(error)), Access::Write) => Some(Err(error.clone())),
            (Known::Present(_), _) => Some(Ok(())),
            (Known::Absent(at), Access::Read) if at.elapsed() < EMPTY_FOR => Some(Ok(())),
            _ => None,
        }
    }
}

/// A format that is not known is not remembered: somebody may set it right without a restart.
fn examine(json: &[u8]) -> Result<Known, ObjectError> {
    let foreign = |problem: String| ObjectError::Foreign { problem };
    let fields: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| foreign(error.to_string()))?;
    let format = fields.get("format").and_then(serde_json::Value::as_u64);
    let format = format.ok_or_else(|| foreign("it has no field \"format\"".to_owned()))?;
    if format != u64::from(FORMAT) {
        return Err(ObjectError::Format { found: format, known: FORMAT });
    }
    let found: Description = serde_json::from_value(fields).map_err(|error| foreign(error.to_string()))?;
    let own = Description::own();
    Ok(Known::Present((found != own).then(|| {
        foreign(format!("it has {found:?}, this version writes {own:?}; publish to another store or prefix"))
    })))
}

impl Objects {
    /// Whether somebody may read without asking for the description before.
    pub(super) fn is_known(&self) -> bool {
        self.handle.known.verdict.read().verdict(Access::Read).is_some()
    }

    /// Whether the store is one that can be used so; the first writer describes it.
    pub(super) async fn ready(&self, access: Access, until: Instant) -> Result<(), ObjectError> {
        let known = &self.handle.known;
        if let Some(verdict) = known.verdict.read().verdict(access) {
            return verdict;
        }
        // One of those who come at once asks, the others wait for what it learns.
        let Ok(_turn) = timeout_at(until, known.turn.lock()).await else {
            return Err(ObjectError::Unreachable(format!("GET {STORE}: no answer within {:?}", self.total)));
        };
        if let Some(verdict) = known.verdict.read().verdict(access) {
            return verdict;
        }
        let mut found = self.fetch(STORE, LONGEST, until).await?;
        if found.is_none() && access == Access::Write {
            self.store(STORE, Bytes::from(Description::own().to_json()), until).await?;
            // Somebody of another version may have been quicker or slower: what is there now is what counts.
            found = self.fetch(STORE, LONGEST, until).await?;
        }
        let learnt = match found {
            Some(json) => examine(&json)?,
            None => Known::Absent(Instant::now()),
        };
        let verdict = learnt.verdict(access);
        *known.verdict.write() = learnt;
        verdict
            .unwrap_or_else(|| Err(ObjectError::Unreachable(format!("{STORE} was written and is not there"))))
    }
}

/// What a handle remembers of the description.
#[derive(Debug, Default)]
pub(super) struct Examined {
    verdict: parking_lot::RwLock<Known>,
    turn: tokio::sync::Mutex<()>,
}

#[cfg(test)]
impl Objects {
    /// As a handle that was opened just now.
    pub(crate) fn forget_description(&self) {
        self.handle.forget();
    }
}

impl Handle {
    /// Another look at the description, as if it had never been read. For tests.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        *self.known.verdict.write() = Known::Nothing;
    }
}
