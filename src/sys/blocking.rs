//! The way from the async side to blocking code.

use tokio::task::JoinError;

/// Runs blocking code on a thread of its own; a panic in it becomes a panic of the caller. The error that is not the code's own
/// means that the runtime goes down.
pub async fn blocking<T, E>(run: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<JoinError> + Send + 'static,
{
    match tokio::task::spawn_blocking(run).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(error.into()),
    }
}
