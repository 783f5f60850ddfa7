//! Tasks that fetch or read layers, and their end.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Owns tasks (**S1**).
#[derive(Debug, Default)]
pub struct Work {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Work {
    /// Runs until its end or [`Work::end`]; to be called on the runtime, or with `runtime` from another thread.
    pub fn spawn(&self, runtime: &tokio::runtime::Handle, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        let task = async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        };
        drop(self.tasks.spawn_on(task, runtime));
    }

    /// Ends what runs, wherever it is. Fills go on at the next start; reads that are not answered wait in the journal for the next
    /// process.
    pub async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
