//! What the verbs that take long have in common: they can be interrupted, and say on a terminal how far they are.

use std::future::Future;
use std::io::IsTerminal;
use std::ops::Deref;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use crate::sys::terminal;

/// How long reads that nobody waits for any more may take at the end.
const END: Duration = Duration::from_secs(1);
/// How often a line is drawn.
const TICK: Duration = Duration::from_millis(200);
/// On fewer columns there is no bar, only the words.
const WIDE: u16 = 72;

/// Runs the work until it is done or interrupted; `then` says what an interrupt left, and what to do.
pub(super) fn run<T>(work: impl Future<Output = anyhow::Result<T>>, then: &str) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = work => done,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                bail!("interrupted; {then}")
            }
        }
    });
    runtime.shutdown_timeout(END);
    done
}

/// A line on the terminal that is drawn over and goes away when it is dropped; hidden where standard error is no terminal.
#[derive(Debug)]
pub(super) struct Display {
    bar: ProgressBar,
    /// Whether there is room for more than the least.
    pub(super) wide: bool,
}

impl Display {
    /// Of work whose end is known, or will be.
    pub(super) fn bar(json: bool, total: u64) -> Display {
        // The message is cut where the line ends: a line that goes on below would not be drawn over.
        Display::new(json, ProgressBar::new(total), |wide| match wide {
            true => "{bar:12} {percent:>3} %  {wide_msg}",
            false => "{percent:>3} %  {wide_msg}",
        })
    }

    /// Of work whose end nobody knows.
    pub(super) fn spinner(json: bool) -> Display {
        Display::new(json, ProgressBar::new_spinner(), |_| "{spinner} {wide_msg}")
    }

    fn new(json: bool, bar: ProgressBar, template: fn(bool) -> &'static str) -> Display {
        let wide = terminal::columns().is_none_or(|columns| columns >= WIDE);
        if json || !std::io::stderr().is_terminal() {
            return Display { bar: ProgressBar::hidden(), wide };
        }
        let style = ProgressStyle::with_template(template(wide));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(TICK);
        Display { bar, wide }
    }
}

impl Deref for Display {
    type Target = ProgressBar;

    fn deref(&self) -> &ProgressBar {
        &self.bar
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
