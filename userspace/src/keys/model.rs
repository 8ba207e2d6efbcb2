//! The key table under a model checker: the same source, compiled over loom's primitives.
//!
//! loom runs each test once for every order in which the threads' operations can happen, up to a number of preemptions,
//! and reports deadlocks.

#![allow(dead_code, reason = "the models use a part of the table")]
#![allow(clippy::duplicate_mod, reason = "the table is compiled a second time on purpose")]

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Mutex as StdMutex;

use pkru::ProtectionKey;

#[path = "caller.rs"]
mod caller;
#[path = "remains.rs"]
mod remains;
#[path = "slots.rs"]
mod slots;
#[path = "table.rs"]
mod table;
#[path = "tagged.rs"]
mod tagged;

/// What [`super::sync`] is to the table elsewhere.
mod sync {
    pub(super) use std::sync::PoisonError;

    pub(super) use loom::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
    pub(super) use loom::sync::{Arc, Mutex, MutexGuard};

    pub(super) fn pause(_: u32) {
        loom::thread::yield_now();
    }
}

use caller::Caller;
use slots::{Slot, Slots};
use sync::{Arc, AtomicU64, AtomicUsize, Mutex};
use table::{Keys, Table, Tagger};
use tagged::Tagged;

use crate::memory::layout::Run;
use crate::sys::Protection;

impl Slots {
    fn new() -> Self {
        let slot = |_| Slot { owner: AtomicU64::new(0), used: AtomicU64::new(0), signal_stack: AtomicUsize::new(0) };
        Self { slots: std::array::from_fn(slot), epoch: AtomicU64::new(1), next: AtomicU64::new(1) }
    }
}

/// Keys and page tables, simulated.
struct Simulated(StdMutex<System>);

struct System {
    keys_left: u8,
    allocated: u8,
    pages: BTreeMap<usize, ProtectionKey>,
    /// How many calls are left before one fails.
    failure_in: usize,
}

impl Tagger for Simulated {
    type Quiet = ();

    fn quiet(&self) {}

    fn allocate(&self) -> io::Result<Option<ProtectionKey>> {
        let mut system = self.0.lock().unwrap();
        if system.keys_left == 0 {
            return Ok(None);
        }
        system.keys_left -= 1;
        system.allocated += 1;
        Ok(ProtectionKey::new(system.allocated))
    }

    unsafe fn tag(&self, pages: Range<usize>, _: Protection, key: ProtectionKey) -> io::Result<()> {
        let mut system = self.0.lock().unwrap();
        for page in pages {
            system.failure_in = system.failure_in.wrapping_sub(1);
            if system.failure_in == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            system.pages.insert(page, key);
        }
        Ok(())
    }
}

fn table(keys: u8, failure_in: usize) -> Arc<Table<Simulated>> {
    let system = System { keys_left: keys, allocated: 0, pages: BTreeMap::new(), failure_in };
    Arc::new(Table { tagger: Simulated(StdMutex::new(system)), slots: Slots::new(), keys: Mutex::new(Keys::new()) })
}

/// One page.
fn pages(page: usize) -> Box<[Run]> {
    std::iter::once(Run::new(page..page + 1)).collect()
}

/// Calls into a domain once, with this page of memory: while the call runs, its page alone carries its key. Returns whether
/// the domain got a key.
fn call(table: &Table<Simulated>, memory: &Arc<Tagged>, page: usize, thread: u64) -> bool {
    let caller = Caller { number: thread, signal_stack: thread as usize };
    let pin = match table.pin(memory, caller) {
        Some(pin) => pin,
        None => match table.assign_key(memory, caller, None) {
            Ok(pin) => pin,
            // A tagging call was made to fail.
            Err(_) => return false,
        },
    };
    let key = table.pinned_key(&pin);
    let check = || {
        let system = table.tagger.0.lock().unwrap();
        assert_eq!(system.pages.get(&page), Some(&key));
        assert_eq!(system.pages.values().filter(|found| **found == key).count(), 1, "key {key} has two owners");
    };
    check();
    loom::thread::yield_now();
    check();
    drop(pin);
    true
}

/// Checks a model with few enough preemptions to end soon.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

/// Two threads call two domains, with as many keys as let only one call run at a time.
fn two_threads(keys: u8, failure_in: usize) {
    check(move || {
        let table = table(keys, failure_in);
        let memories = [0usize, 1].map(|page| table.describe(pages(page)));
        let other = loom::thread::spawn({
            let (table, memory) = (table.clone(), memories[1].clone());
            move || {
                call(&table, &memory, 1, 2);
            }
        });
        call(&table, &memories[0], 0, 1);
        call(&table, &memories[0], 0, 1);
        other.join().unwrap();
        // The failure, if there was one, is over.
        table.tagger.0.lock().unwrap().failure_in = 0;
        assert!(call(&table, &memories[0], 0, 1) && call(&table, &memories[1], 1, 1));
        assert!(table.lock().remains.is_empty());
    });
}

#[test]
fn two_threads_take_turns_with_one_key() {
    two_threads(2, 0);
}

#[test]
fn two_threads_with_a_key_each() {
    two_threads(3, 0);
}

#[test]
fn two_threads_when_tagging_fails() {
    for failure_in in 1..6 {
        two_threads(2, failure_in);
    }
}

/// A domain is dropped while another needs its key.
#[test]
fn a_key_is_released_while_another_waits_for_it() {
    check(|| {
        let table = table(2, 0);
        let memories = [0usize, 1].map(|page| table.describe(pages(page)));
        call(&table, &memories[0], 0, 1);
        let other = loom::thread::spawn({
            let (table, memory) = (table.clone(), memories[1].clone());
            move || {
                call(&table, &memory, 1, 2);
            }
        });
        // The first attempt fails.
        let (unmapping, mut attempts) = (table.clone(), 0);
        table.release(&memories[0], move || {
            attempts += 1;
            attempts > 1 && unmapping.tagger.0.lock().unwrap().pages.remove(&0).is_some()
        });
        other.join().unwrap();
    });
}

/// Keys are withheld from a thread that calls a domain meanwhile.
#[test]
fn keys_are_withheld_while_another_thread_calls() {
    check(|| {
        let table = table(2, 0);
        let memory = table.describe(pages(0));
        let other = loom::thread::spawn({
            let (table, memory) = (table.clone(), memory.clone());
            move || {
                call(&table, &memory, 0, 2);
            }
        });
        let this = Caller { number: 1, signal_stack: 1 };
        let result = table.while_no_domain_has_a_key(this, || {
            assert_eq!(table.key_of(&memory), None);
            Ok(())
        });
        assert_eq!(result, Ok(()));
        other.join().unwrap();
    });
}
