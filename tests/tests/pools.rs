//! Pools of domains.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pkru_userspace::{Domain, Error, Pool};
use support::{contain, domain, mistake, small, suite, works};

suite! {
    a_pool_hands_domains_to_threads,
    waiting_for_a_domain_has_an_end,
    tasks_of_one_thread_share_a_pool,
    a_pool_that_cannot_make_a_domain,
    a_pool_replaces_what_is_retired,
}

fn a_pool_hands_domains_to_threads() {
    drop(domain("first"));
    let made = Arc::new(AtomicU64::new(0));
    let pool = Pool::new(small("pooled"), 3);
    std::thread::scope(|scope| {
        for number in 0..12u64 {
            let (pool, made) = (&pool, &made);
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut domain = pool.get().unwrap();
                    assert_eq!(domain.call(|| number * 3).unwrap(), number * 3);
                    if number % 4 == 0 {
                        contain(&mut domain, mistake);
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(made.load(Ordering::Relaxed), 240);
    let out: Vec<_> = (0..3).map(|_| pool.try_get().unwrap().unwrap()).collect();
    assert!(pool.try_get().unwrap().is_none());
    let waiting = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(pool.get().unwrap());
            waiting.store(false, Ordering::Relaxed);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(waiting.load(Ordering::Relaxed), "the pool has no free domain");
        drop(out);
    });
    assert!(!waiting.load(Ordering::Relaxed));
}

fn waiting_for_a_domain_has_an_end() {
    let pool = Pool::new(small("pooled"), 1);
    let mut domain = pool.get_timeout(Duration::ZERO).unwrap().expect("one is free");
    works(&mut domain);
    // This thread holds the only one, so `get` would never return.
    assert!(pool.get_timeout(Duration::ZERO).unwrap().is_none());
    assert!(pool.get_timeout(Duration::from_millis(20)).unwrap().is_none());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.get_timeout(Duration::MAX).unwrap().map(|mut domain| works(&mut domain)));
        drop(domain);
        assert!(waiting.join().unwrap().is_some());
    });
    works(&mut pool.get().unwrap());
}

/// A task that holds a domain while it waits, and one that wants it meanwhile, on one thread.
fn tasks_of_one_thread_share_a_pool() {
    /// Lets other tasks run.
    async fn pause() {
        let mut paused = false;
        std::future::poll_fn(|_| if std::mem::replace(&mut paused, true) { Poll::Ready(()) } else { Poll::Pending })
            .await;
    }
    let pool = Pool::new(small("pooled"), 1);
    let task = async || {
        let mut refused = 0;
        let mut domain = loop {
            match pool.get_timeout(Duration::from_millis(1)).unwrap() {
                Some(domain) => break domain,
                None => refused += 1,
            }
            pause().await;
        };
        for _ in 0..3 {
            works(&mut domain);
            pause().await;
        }
        refused
    };
    let mut tasks = [Box::pin(task()), Box::pin(task())];
    let mut refused = [None; 2];
    let mut context = Context::from_waker(Waker::noop());
    while refused.contains(&None) {
        for (task, refused) in tasks.iter_mut().zip(&mut refused).filter(|(_, refused)| refused.is_none()) {
            if let Poll::Ready(count) = task.as_mut().poll(&mut context) {
                *refused = Some(count);
            }
        }
    }
    assert_eq!(refused[0], Some(0));
    assert!(refused[1] > Some(0), "control: the second task had to wait");
}

fn a_pool_that_cannot_make_a_domain() {
    drop(domain("first"));
    let pool = Pool::new(Domain::builder("too big").heap_size(usize::MAX / 2), 1);
    for _ in 0..3 {
        assert!(matches!(pool.get(), Err(Error::Size { .. })));
    }
}

fn a_pool_replaces_what_is_retired() {
    drop(domain("first"));
    let pool = Pool::new(small("pooled").retire_after(1), 2);
    for _ in 0..5 {
        let mut domain = pool.get().unwrap();
        domain.call(mistake).unwrap_err();
        assert!(domain.is_retired());
    }
    let (mut one, mut two) = (pool.get().unwrap(), pool.get().unwrap());
    works(&mut one);
    works(&mut two);
}
