//! Property tests of the key table over a simulated system whose every call can fail.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use pkru::{KeySet, ProtectionKey};
use proptest::prelude::*;

use super::caller::Caller;
use super::slots::{Pin, Slots};
use super::table::{Keys, Table, Tagger};
use super::tagged::Tagged;
use crate::memory::layout::Run;
use crate::sys::Protection;

/// Keys and page tables, simulated.
#[derive(Clone, Default)]
struct Simulated(Arc<Mutex<System>>);

impl Simulated {
    fn system(&self) -> MutexGuard<'_, System> {
        self.0.lock().unwrap()
    }
}

#[derive(Debug, Default)]
struct System {
    /// How many keys can be allocated yet.
    keys_left: usize,
    allocated: u8,
    /// The key of each page that is mapped, key 0 if it was never tagged.
    pages: BTreeMap<usize, ProtectionKey>,
    /// The protection of each page that was tagged.
    protections: BTreeMap<usize, Protection>,
    /// Which of the next calls fail.
    failures: Vec<bool>,
}

impl System {
    fn fails(&mut self) -> bool {
        self.failures.pop().unwrap_or(false)
    }
}

impl Tagger for Simulated {
    type Quiet = ();

    fn quiet(&self) {}

    fn allocate(&self) -> io::Result<Option<ProtectionKey>> {
        let mut system = self.system();
        if system.fails() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if system.keys_left == 0 {
            return Ok(None);
        }
        system.keys_left -= 1;
        system.allocated += 1;
        Ok(ProtectionKey::new(system.allocated))
    }

    unsafe fn tag(&self, pages: Range<usize>, protection: Protection, key: ProtectionKey) -> io::Result<()> {
        let mut system = self.system();
        for page in pages {
            // Like the kernel, it can fail in the middle of a range.
            if system.fails() {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            *system.pages.get_mut(&page).expect("a page that is tagged is mapped") = key;
            system.protections.insert(page, protection);
        }
        Ok(())
    }
}

/// What a test does next. Numbers choose among what there is.
#[derive(Debug, Clone)]
enum Step {
    NewMemory,
    Call {
        memory: usize,
        thread: usize,
    },
    EndCall {
        call: usize,
    },
    /// Code in a domain changes the protection of one of its pages.
    Protect {
        call: usize,
        page: usize,
        bits: u64,
    },
    /// Resumes a suspended call, which wants the key that it had.
    CallWithKey {
        memory: usize,
        thread: usize,
        key: u8,
    },
    Drop {
        memory: usize,
        /// How many times unmapping it fails.
        failures: usize,
    },
    MapAnew {
        memory: usize,
    },
    Take,
    GiveBack {
        taken: usize,
    },
    Closed,
    Limit {
        keys: usize,
    },
    HandIn,
    WhileNoneHasAKey {
        thread: usize,
    },
    Fail {
        failures: Vec<bool>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let number = 0..64usize;
    prop_oneof![
        3 => Just(Step::NewMemory),
        8 => (number.clone(), 0..3usize).prop_map(|(memory, thread)| Step::Call { memory, thread }),
        6 => number.clone().prop_map(|call| Step::EndCall { call }),
        4 => (number.clone(), 0..PAGES, 0..8u64).prop_map(|(call, page, bits)| Step::Protect { call, page, bits }),
        2 => (number.clone(), 0..3usize, 1..16u8)
            .prop_map(|(memory, thread, key)| Step::CallWithKey { memory, thread, key }),
        2 => (number.clone(), 0..4usize).prop_map(|(memory, failures)| Step::Drop { memory, failures }),
        1 => number.clone().prop_map(|memory| Step::MapAnew { memory }),
        1 => Just(Step::Take),
        1 => number.prop_map(|taken| Step::GiveBack { taken }),
        1 => Just(Step::Closed),
        1 => (0..16usize).prop_map(|keys| Step::Limit { keys }),
        1 => Just(Step::HandIn),
        1 => (0..3usize).prop_map(|thread| Step::WhileNoneHasAKey { thread }),
        3 => proptest::collection::vec(prop::bool::weighted(0.3), 1..8).prop_map(|failures| Step::Fail { failures }),
    ]
}

/// The pages that one memory has, in two ranges.
const PAGES: usize = 3;

struct World<'a> {
    table: &'a Table<Simulated>,
    next_page: usize,
    memories: Vec<Arc<Tagged>>,
    calls: Vec<(Arc<Tagged>, usize, Pin<'a>)>,
    taken: Vec<ProtectionKey>,
}

fn caller(thread: usize) -> Caller {
    Caller { number: thread as u64 + 1, signal_stack: (thread + 1) << 20 }
}

impl World<'_> {
    fn key(&self, memory: &Tagged) -> Option<ProtectionKey> {
        self.table.key_of(memory)
    }

    fn is_called(&self, memory: &Arc<Tagged>) -> bool {
        self.calls.iter().any(|(called, ..)| Arc::ptr_eq(called, memory))
    }

    /// Whether a thread that asks for a key would wait for other threads, of which there are none here.
    fn would_wait(&self, memory: &Arc<Tagged>, want: Option<ProtectionKey>) -> bool {
        let locked = self.table.lock();
        if self.table.key_of(memory).is_some() {
            return false;
        }
        let is_pinned = |key: ProtectionKey| self.table.slots.of(key).is_pinned();
        if let Some(want) = want {
            return is_pinned(want) || (locked.closed.is_none() && locked.owners[want.index()].is_some());
        }
        if !locked.free.is_empty() || !locked.owned().any(is_pinned) {
            return false;
        }
        let idle = locked.owned().filter(|key| !is_pinned(*key)).count();
        let below_limit = locked.limit.saturating_sub(locked.ours.len());
        let can_allocate = self.table.tagger.system().keys_left.min(below_limit);
        // Without a closed key, one of them becomes it.
        let needed = if locked.closed.is_none() { 2 } else { 1 };
        idle + can_allocate < needed
    }

    fn make_memory(&mut self) {
        let start = self.next_page;
        self.next_page += PAGES;
        let pages = (start..start + PAGES).map(|page| (page, ProtectionKey::DEFAULT));
        self.table.tagger.system().pages.extend(pages);
        let runs = Box::new([start..start + 1, start + 1..start + PAGES].map(Run::new));
        self.memories.push(self.table.describe(runs));
    }

    fn call(&mut self, memory: usize, thread: usize, want: Option<ProtectionKey>) {
        let Some(memory) = choose(&self.memories, memory).cloned() else { return };
        if self.is_called(&memory) || self.would_wait(&memory, want) {
            return;
        }
        let pin = match self.table.pin(&memory, caller(thread)) {
            Some(pin) => Ok(pin),
            None => self.table.assign_key(&memory, caller(thread), want),
        };
        if let Ok(pin) = pin {
            let key = self.table.pinned_key(&pin);
            assert_eq!(self.key(&memory), Some(key));
            assert!(want.is_none_or(|want| want == key) || self.key(&memory).is_some());
            self.calls.push((memory, thread, pin));
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::NewMemory => self.make_memory(),
            Step::Call { memory, thread } => self.call(memory, thread, None),
            Step::CallWithKey { memory, thread, key } => self.call(memory, thread, ProtectionKey::new(key)),
            Step::EndCall { call } => {
                if !self.calls.is_empty() {
                    drop(self.calls.swap_remove(call % self.calls.len()));
                }
            }
            Step::Protect { call, page, bits } => {
                let Some((memory, _, pin)) = choose(&self.calls, call) else { return };
                let protection = Protection::from_bits(bits).expect("any of three bits");
                let key = self.table.pinned_key(pin);
                let mut pages: Vec<_> = memory.runs().iter().flat_map(single_pages).collect();
                pages[page].protection = protection;
                // SAFETY: the pages are simulated.
                if unsafe { self.table.tagger.tag(pages[page].pages.clone(), protection, key) }.is_ok() {
                    self.table.set_runs(memory, pages.into());
                }
            }
            Step::Drop { memory, mut failures } => {
                if self.memories.is_empty() {
                    return;
                }
                let memory = self.memories.swap_remove(memory % self.memories.len());
                if self.is_called(&memory) {
                    self.memories.push(memory);
                    return;
                }
                let (unmapped, tagger) = (memory.clone(), self.table.tagger.clone());
                self.table.release(&memory, move || {
                    if failures > 0 {
                        failures -= 1;
                        return false;
                    }
                    let mut system = tagger.system();
                    unmapped.runs().iter().flat_map(|run| run.pages.clone()).for_each(|page| {
                        system.pages.remove(&page);
                    });
                    true
                });
            }
            Step::MapAnew { memory } => {
                let Some(memory) = choose(&self.memories, memory) else { return };
                {
                    let mut system = self.table.tagger.system();
                    for page in memory.runs().iter().flat_map(|run| run.pages.clone()) {
                        system.pages.insert(page, ProtectionKey::DEFAULT);
                    }
                }
                // On failure its owner uses the memory no more.
                let _ = self.table.tag_again(memory);
            }
            Step::Take => {
                let is_safe = {
                    let locked = self.table.lock();
                    !locked.free.is_empty() || locked.owned().all(|key| !self.table.slots.of(key).is_pinned())
                };
                if is_safe && let Ok(key) = self.table.take_for_good(None) {
                    self.taken.push(key);
                }
            }
            Step::GiveBack { taken } => {
                if !self.taken.is_empty() {
                    self.table.give_back(self.taken.swap_remove(taken % self.taken.len()));
                }
            }
            Step::Closed => {
                let is_safe = self.table.lock().owned().all(|key| !self.table.slots.of(key).is_pinned());
                if is_safe {
                    let _ = self.table.closed(None);
                }
            }
            Step::Limit { keys } => self.table.set_limit(keys),
            Step::HandIn => {
                let mut system = self.table.tagger.system();
                if system.keys_left > 0 {
                    system.keys_left -= 1;
                    system.allocated += 1;
                    self.table.hand_in(ProtectionKey::new(system.allocated).expect("there are at most 15"));
                }
            }
            Step::WhileNoneHasAKey { thread } => {
                if self.calls.is_empty() {
                    let ran = Cell::new(false);
                    let result = self.table.while_no_domain_has_a_key(caller(thread), || {
                        ran.set(true);
                        Ok(())
                    });
                    assert_eq!(result.is_ok(), ran.get());
                    assert!(result.is_err() || self.memories.iter().all(|memory| self.key(memory).is_none()));
                }
            }
            Step::Fail { failures } => self.table.tagger.system().failures = failures,
        }
    }

    /// What holds after every step.
    fn check(&self) {
        let locked = self.table.lock();
        let system = self.table.tagger.system();
        let mut accounted = locked.free;
        let mut add = |key: ProtectionKey, what: &str| {
            assert!(!accounted.contains(key), "key {key} is {what}, and something else too");
            accounted.insert(key);
        };
        locked.closed.into_iter().for_each(|key| add(key, "closed"));
        self.taken.iter().for_each(|key| add(*key, "taken"));
        for key in locked.owned() {
            add(key, "a domain's");
            let owner = locked.owners[key.index()].as_ref().expect("it is owned");
            assert_eq!(self.table.key_of(owner), Some(key));
        }
        for memory in &self.memories {
            let key = self.table.key_of(memory);
            assert!(
                key.is_none_or(|key| locked.owners[key.index()].as_ref().is_some_and(|it| Arc::ptr_eq(it, memory)))
            );
        }
        // No key is lost: each is free, closed, taken, a domain's, or on pages that are to be tagged or unmapped.
        let remaining = locked.remains.iter().flat_map(|remains| remains.keys.iter());
        remaining.for_each(|key| add(key, "on what a failure has left"));
        let everywhere = accounted.bits();
        assert_eq!(
            locked.ours.bits() & !everywhere,
            0,
            "keys {:?} are lost",
            KeySet::from_bits(locked.ours.bits() & !everywhere)
        );
        // No key is free while pages carry it.
        for (page, key) in &system.pages {
            assert!(!locked.free.contains(*key), "page {page} carries key {key}, which is free");
        }
        // A call's memory carries its key, all of it, and nothing else does. It has the protection that it should have.
        for (memory, thread, pin) in &self.calls {
            for run in memory.runs().iter() {
                assert!(run.pages.clone().all(|page| system.protections.get(&page) == Some(&run.protection)));
            }
            let key = self.table.pinned_key(pin);
            assert!(self.table.slots.of(key).is_pinned_by(caller(*thread)));
            for (page, found) in &system.pages {
                let is_its = memory.runs().iter().any(|run| run.pages.contains(page));
                assert!(is_its || *found != key, "page {page} carries key {key} of another");
            }
        }
    }
}

/// Once nothing fails any more every key can be used again.
fn recover(world: &mut World<'_>) {
    world.take(Step::Fail { failures: Vec::new() });
    world.take(Step::Limit { keys: 15 });
    world.calls.clear();
    world.taken.drain(..).for_each(|key| world.table.give_back(key));
    let keys = {
        let system = world.table.tagger.system();
        system.keys_left + usize::from(system.allocated)
    };
    // Of unmapping, three attempts fail at most.
    (0..4).for_each(|_| world.make_memory());
    if keys < 2 {
        return;
    }
    world.memories.clear();
    for memory in 0..keys - 1 {
        world.make_memory();
        world.call(memory, 0, None);
        world.check();
    }
    assert_eq!(world.calls.len(), keys - 1, "all keys but the closed one are in use at the same time");
    assert!(world.table.lock().remains.is_empty());
}

fn single_pages(run: &Run) -> impl Iterator<Item = Run> + use<> {
    let run = run.clone();
    run.pages.clone().map(move |page| Run { pages: page..page + 1, ..run.clone() })
}

fn choose<T>(of: &[T], number: usize) -> Option<&T> {
    if of.is_empty() { None } else { of.get(number % of.len()) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn keys_are_neither_shared_nor_lost(keys in 0..16usize, steps in proptest::collection::vec(step(), 1..60)) {
        let keys = keys.min(15);
        let tagger = Simulated(Arc::new(Mutex::new(System { keys_left: keys, ..System::default() })));
        let table = Table { tagger, slots: Slots::new(), keys: Mutex::new(Keys::new()) };
        let (memories, calls, taken) = (Vec::new(), Vec::new(), Vec::new());
        let mut world = World { table: &table, next_page: 0, memories, calls, taken };
        for step in steps {
            world.take(step);
            world.check();
        }
        recover(&mut world);
    }
}
