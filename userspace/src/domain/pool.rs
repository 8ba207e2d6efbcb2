//! Domains that threads share.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Builder, Domain};
use crate::Error;

/// Domains of one kind that any number of threads share.
///
/// # Examples
///
/// ```
/// use pkru_userspace::{Domain, Pool};
///
/// # if pkru_userspace::capability::detect().is_err() { return Ok(()) }
/// let pool = Pool::new(Domain::builder("worker"), 4);
/// std::thread::scope(|scope| {
///     for thread in 0..8u64 {
///         let pool = &pool;
///         scope.spawn(move || {
///             let mut domain = pool.get().expect("this machine has protection keys");
///             assert_eq!(domain.call(|| thread * thread).expect("nothing goes wrong here"), thread * thread);
///         });
///     }
/// });
/// # Ok::<(), pkru_userspace::Error>(())
/// ```
///
/// # In asynchronous code
///
/// A call blocks its thread, and so does [`get`](Self::get). A task that waits there while another task of its thread holds
/// a domain over an `.await` waits for ever, because the other task cannot go on. So a domain is taken, called and given
/// back on a thread that may block, as by the `spawn_blocking` of a runtime:
///
/// ```
/// use std::sync::Arc;
///
/// use pkru_userspace::{Domain, Pool};
///
/// # mod runtime {
/// #     /// Stands in for that of a runtime.
/// #     pub async fn spawn_blocking<R: Send + 'static>(function: impl FnOnce() -> R + Send + 'static) -> R {
/// #         std::thread::spawn(function).join().unwrap()
/// #     }
/// # }
/// async fn count_digits(pool: &Arc<Pool>, text: String) -> Option<u64> {
///     let pool = Arc::clone(pool);
///     let count = move || {
///         let mut domain = pool.get().ok()?;
///         domain.call(|| text.chars().filter(char::is_ascii_digit).count() as u64).ok()
///     };
///     runtime::spawn_blocking(count).await
/// }
/// # if pkru_userspace::capability::detect().is_err() { return }
/// # let pool = Arc::new(Pool::new(Domain::builder("worker"), 1));
/// # let mut counting = std::pin::pin!(count_digits(&pool, "8 of 15".into()));
/// # let polled = counting.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
/// # assert_eq!(polled, std::task::Poll::Ready(Some(3)));
/// ```
///
/// What [`get`](Self::get) returns is not `Send`, so a task that may change its thread cannot hold it over an `.await`:
///
/// ```compile_fail
/// # use pkru_userspace::Pool;
/// fn spawn(task: impl Future<Output = ()> + Send) {}
///
/// fn start(pool: &'static Pool) {
///     spawn(async {
///         let mut domain = pool.get().unwrap();
///         std::future::ready(()).await;
///         domain.call(|| ()).unwrap();
///     });
/// }
/// ```
///
/// Tasks that stay on their thread can. There [`try_get`](Self::try_get) and [`get_timeout`](Self::get_timeout) do not wait
/// for ever, and clippy finds the mistake with `await-holding-invalid-types = ["pkru_userspace::Pooled"]`.
#[derive(Debug)]
pub struct Pool {
    builder: Builder,
    most: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Domain>,
    /// Those that are idle, in use or being made.
    count: usize,
}

impl Pool {
    /// Makes a pool of up to `most` domains, which are made when they are first needed.
    ///
    /// # Panics
    ///
    /// If `most` is 0.
    #[must_use]
    pub fn new(builder: Builder, most: usize) -> Self {
        assert!(most > 0, "a pool has at least one domain");
        Self { builder, most, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Takes a domain out of the pool until the result is dropped. Waits while all domains are in use, for ever if the
    /// calling thread itself holds them.
    ///
    /// A domain keeps what calls leave in it, also for the next thread, unless it is [transient](Builder::transient). A
    /// [retired](Builder::retire_after) domain is replaced by a new one.
    ///
    /// # Errors
    ///
    /// As for [`Builder::build`].
    pub fn get(&self) -> Result<Pooled<'_>, Error> {
        let mut state = self.lock();
        loop {
            if let Some(taken) = self.take(&mut state) {
                drop(state);
                return self.make(taken);
            }
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a domain as [`get`](Self::get) does; `None` if that takes longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As for [`Builder::build`].
    pub fn get_timeout(&self, timeout: Duration) -> Result<Option<Pooled<'_>>, Error> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(taken) = self.take(&mut state) {
                drop(state);
                return self.make(taken).map(Some);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            (state, _) = self.returned.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a domain as [`get`](Self::get) does; `None` if it would have to wait.
    ///
    /// # Errors
    ///
    /// As for [`Builder::build`].
    pub fn try_get(&self) -> Result<Option<Pooled<'_>>, Error> {
        let taken = self.take(&mut self.lock());
        taken.map(|taken| self.make(taken)).transpose()
    }

    /// Takes an idle domain; `Some(None)` is permission to build one.
    fn take(&self, state: &mut State) -> Option<Option<Domain>> {
        // The one that was used last is the likeliest to have a key.
        if let Some(domain) = state.idle.pop() {
            return Some(Some(domain));
        }
        (state.count < self.most).then(|| {
            state.count += 1;
            None
        })
    }

    fn make(&self, taken: Option<Domain>) -> Result<Pooled<'_>, Error> {
        // It goes back when it is dropped, also if there is no domain in it.
        let mut pooled = Pooled { pool: self, domain: taken, not_send: PhantomData };
        if pooled.domain.is_none() {
            pooled.domain = Some(self.builder.clone().build()?);
        }
        Ok(pooled)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A domain of a [`Pool`].
///
/// It is given back by the thread that has taken it: see [the pool](Pool#in-asynchronous-code).
pub struct Pooled<'a> {
    pool: &'a Pool,
    /// Invariant: it is there once the user has this, until it is dropped.
    domain: Option<Domain>,
    not_send: PhantomData<MutexGuard<'static, ()>>,
}

impl Deref for Pooled<'_> {
    type Target = Domain;

    fn deref(&self) -> &Domain {
        self.domain.as_ref().expect("it is there until this is dropped")
    }
}

impl DerefMut for Pooled<'_> {
    fn deref_mut(&mut self) -> &mut Domain {
        self.domain.as_mut().expect("it is there until this is dropped")
    }
}

impl Drop for Pooled<'_> {
    fn drop(&mut self) {
        // One that is retired makes room for a new one.
        let domain = self.domain.take().filter(|domain| !domain.is_retired());
        let mut state = self.pool.lock();
        match domain {
            Some(domain) => state.idle.push(domain),
            None => state.count -= 1,
        }
        drop(state);
        self.pool.returned.notify_one();
    }
}

impl fmt::Debug for Pooled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.domain.fmt(f)
    }
}
