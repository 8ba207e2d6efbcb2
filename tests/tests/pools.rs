//! Pools of domains.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pkru_userspace::{Domain, Error, Pool};
use support::{contain, domain, mistake, small, suite, works};

suite! {
    a_pool_hands_domains_to_threads,
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
