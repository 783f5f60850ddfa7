//! The last warnings and errors of this process, for people who look at its status page.
//!
//! They are a copy of what the log says, in a few kilobytes of memory: the log is the authority, and has all of them.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// How many are remembered.
const MOST: usize = 32;
/// The longest text of one, in bytes.
const LONGEST: usize = 600;

static RECENT: Mutex<VecDeque<Fault>> = Mutex::new(VecDeque::new());

/// Something that was logged as a warning or an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// When it was last logged, seconds since 1970 UTC.
    pub at: i64,
    /// Whether it was an error, not a warning.
    pub is_error: bool,
    /// The message with its fields.
    pub text: String,
    /// How often it was logged.
    pub times: u64,
}

/// The last warnings and errors, the newest first; one that was logged again and again is there once.
pub fn recent_faults() -> Vec<Fault> {
    RECENT.lock().iter().cloned().collect()
}

/// Remembers them.
#[derive(Debug)]
pub(super) struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let at = i64::try_from(now).unwrap_or(i64::MAX);
        let is_error = *event.metadata().level() == Level::ERROR;
        remember(&mut RECENT.lock(), Fault { at, is_error, text: text.line(), times: 1 });
    }
}

fn remember(recent: &mut VecDeque<Fault>, mut fault: Fault) {
    if let Some(known) = recent.iter().position(|known| known.text == fault.text) {
        fault.times += recent.remove(known).map_or(0, |known| known.times);
    }
    recent.push_front(fault);
    recent.truncate(MOST);
}

/// An event as one line: the message, then its fields.
#[derive(Debug, Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn line(self) -> String {
        let line = match self.fields.is_empty() {
            true => self.message,
            false => format!("{} ({})", self.message, self.fields),
        };
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let mut short: String = line.chars().map(printable).collect();
        if short.len() > LONGEST {
            short.truncate(short.floor_char_boundary(LONGEST));
            short.push('…');
        }
        short
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let into = match field.name() {
            "message" => &mut self.message,
            _ => &mut self.fields,
        };
        // What is cut off in the end need not be put together first.
        if into.len() > LONGEST {
            return;
        }
        let written = match field.name() {
            "message" => write!(into, "{value:?}"),
            name if into.is_empty() => write!(into, "{name}: {value:?}"),
            name => write!(into, ", {name}: {value:?}"),
        };
        written.expect("writing to a string does not fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::filter::LevelFilter;
    use tracing_subscriber::layer::SubscriberExt as _;

    fn fault(text: &str) -> Fault {
        Fault { at: 1, is_error: false, text: text.to_owned(), times: 1 }
    }

    #[test]
    fn what_comes_again_is_counted_and_the_newest_is_first() {
        let mut recent = VecDeque::new();
        for text in ["a", "b", "a", "c", "a"] {
            remember(&mut recent, fault(text));
        }
        let told: Vec<_> = recent.iter().map(|fault| (fault.text.as_str(), fault.times)).collect();
        assert_eq!(told, [("a", 3), ("c", 1), ("b", 1)]);
        (0..200).for_each(|n| remember(&mut recent, fault(&n.to_string())));
        assert_eq!(recent.len(), MOST);
        assert_eq!(recent[0].text, "199");
    }

    #[test]
    fn warnings_are_kept_in_one_line_of_bounded_length_and_the_rest_is_not() {
        let subscriber = tracing_subscriber::registry().with(Recent.with_filter(LevelFilter::WARN));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("all is well, says test-7f3a");
            tracing::error!(serial = 7, error = %"no\nroom", "test-7f3a");
            tracing::warn!(long = "ä".repeat(LONGEST), "test-7f3a");
        });
        let mut ours = recent_faults();
        ours.retain(|fault| fault.text.contains("test-7f3a"));
        assert_eq!(ours.len(), 2, "{ours:?}");
        assert!(!ours[0].is_error && ours[0].text.len() <= LONGEST + '…'.len_utf8());
        assert_eq!(
            (ours[1].is_error, ours[1].text.as_str()),
            (true, "test-7f3a (serial: 7, error: no room)")
        );
    }
}
