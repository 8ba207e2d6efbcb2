//! The time that a call may take.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::signal::trap::{DEADLINE, deadline_value};
use crate::thread::Thread;
use crate::{Error, sys};

/// The deadline of a call, if it has one. Its timer runs while the domain does.
pub(super) struct Deadline<'a> {
    end: Option<Instant>,
    /// The thread whose timer it is.
    thread: &'a Thread,
    /// The timer is running.
    is_armed: Cell<bool>,
}

/// Why a call with a deadline does not run.
#[derive(Debug)]
pub(super) enum DeadlineError {
    /// The deadline has passed.
    Passed,
    /// There is no timer.
    Timer(Error),
}

impl<'a> Deadline<'a> {
    /// Starts the timer.
    pub(super) fn start(limit: Option<Duration>, thread: &'a Thread) -> Result<Self, DeadlineError> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let deadline = Self { end, thread, is_armed: Cell::new(false) };
        deadline.go_on()?;
        Ok(deadline)
    }

    /// Starts the timer for the time that is left.
    pub(super) fn go_on(&self) -> Result<(), DeadlineError> {
        let Some(end) = self.end else { return Ok(()) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(DeadlineError::Passed);
        }
        let system = |operation| move |error| DeadlineError::Timer(Error::system(operation)(error));
        // A forked child has no timer of its parent's, and a callback can fork.
        let timer = match self.thread.timer().get() {
            Some(timer) => timer,
            None => sys::create_timer(DEADLINE, deadline_value()).map_err(system("make a timer for deadlines"))?,
        };
        self.thread.timer().set(Some(timer));
        self.is_armed.set(true);
        sys::set_timer(timer, Some(left)).map_err(system("start the timer for a deadline"))
    }

    /// Stops the timer.
    pub(super) fn pause(&self) {
        if self.is_armed.take()
            && let Some(timer) = self.thread.timer().get()
        {
            // A timer that goes on would end a later call.
            if sys::set_timer(timer, None).is_err() {
                sys::delete_timer(timer);
                self.thread.timer().set(None);
            }
        }
    }
}

impl Drop for Deadline<'_> {
    fn drop(&mut self) {
        self.pause();
    }
}
