//! Making, using, discarding and dropping domains; limits; threads.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use pkru_userspace::{Domain, Error};
use support::{build, contain, domain, mistake, suite, works};

suite! {
    state_lasts_until_a_violation,
    discard_leaves_nothing_to_read,
    sizes_that_cannot_be_had_are_refused,
    the_smallest_domain_works,
    nothing_leaks_over_many_lives,
    ten_thousand_rewinds,
    threads_have_domains_of_their_own,
    a_domain_moves_between_threads,
    results_of_many_calls_do_not_fill_the_heap,
    empty_results_with_room_do_not_fill_the_heap,
    a_thread_that_blocks_every_signal,
    a_program_with_a_signal_stack_of_its_own,
    locked_memory_is_discarded_from_any_thread,
    a_library_that_binds_lazily_works_at_once,
    a_library_that_binds_lazily_is_given_away,
    a_call_from_a_signal_handler,
    a_result_that_lies_on_the_stack_is_not_freed,
    the_children_of_a_fork_have_domains_that_work,
    a_domain_cannot_make_or_call_another,
    a_call_from_a_thread_locals_destructor,
}

fn state_lasts_until_a_violation() {
    let mut domain = domain("state");
    let place = domain.call(|| std::ptr::from_mut(Box::leak(Box::new(0u64))) as usize).unwrap();
    let count = || {
        let place = place as *mut u64;
        // SAFETY: the word is on the domain's heap until that is discarded.
        unsafe { place.write(place.read() + 1) };
        // SAFETY: as above.
        unsafe { place.read() }
    };
    assert_eq!([domain.call(count).unwrap(), domain.call(count).unwrap()], [1, 2]);
    contain(&mut domain, mistake);
    // SAFETY: the word was on the domain's heap; what is there now reads as zero, or as what was allocated since.
    let word = domain.call(|| unsafe { (place as *const u64).read() }).unwrap();
    assert_ne!(word, 2, "the state is gone");
}

fn discard_leaves_nothing_to_read() {
    let mut domain = domain("secret");
    let secret = |byte: u8| domain_secret(byte);
    fn domain_secret(byte: u8) -> usize {
        vec![byte; 1 << 20].leak().as_ptr() as usize
    }
    let place = domain.call(|| secret(0x77)).unwrap();
    let look = || {
        // SAFETY: the range is in the domain's heap.
        unsafe { std::slice::from_raw_parts(place as *const u8, 1 << 20) }.iter().filter(|byte| **byte == 0x77).count()
            as u64
    };
    assert_eq!(domain.call(look).unwrap(), 1 << 20, "control");
    domain.discard();
    assert_eq!(domain.call(look).unwrap(), 0);
}

fn sizes_that_cannot_be_had_are_refused() {
    let _ = domain("control");
    for (builder, part) in [
        (Domain::builder("none").heap_size(0), "heap"),
        (Domain::builder("none").stack_size(0), "stack"),
        (Domain::builder("huge").heap_size(usize::MAX), "heap"),
        (Domain::builder("huge").heap_size(1 << 45), "heap"),
        (Domain::builder("huge").stack_size(1 << 45), "stack"),
    ] {
        match builder.build() {
            Err(error @ Error::Size { part: found, limit, .. }) => {
                assert_eq!(found, part);
                assert!(error.to_string().contains(&limit.to_string()), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

fn the_smallest_domain_works() {
    let mut domain = build(Domain::builder("small").stack_size(16384).heap_size(16384));
    works(&mut domain);
}

/// How many mappings the process has.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

fn nothing_leaks_over_many_lives() {
    let live = || {
        let mut domain = Domain::builder("short").build().unwrap();
        contain(&mut domain, mistake);
    };
    drop(domain("first"));
    live();
    let before = mappings();
    for _ in 0..300 {
        live();
    }
    assert!(mappings() <= before + 2, "{before} mappings before, {} after", mappings());
}

fn ten_thousand_rewinds() {
    let mut domain = domain("rewind");
    for _ in 0..10_000 {
        domain.call(mistake).unwrap_err();
    }
    works(&mut domain);
}

fn threads_have_domains_of_their_own() {
    drop(domain("first"));
    let threads: Vec<_> = (0..4)
        .map(|number| {
            std::thread::spawn(move || {
                let mut domain = Domain::builder("thread").build().unwrap();
                for round in 0..500 {
                    assert_eq!(domain.call(|| number * 1000 + round).unwrap(), number * 1000 + round);
                    domain.call(mistake).unwrap_err();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn a_domain_moves_between_threads() {
    let mut domain = domain("mover");
    works(&mut domain);
    let mut domain = std::thread::spawn(move || {
        works(&mut domain);
        contain(&mut domain, mistake);
        domain
    })
    .join()
    .unwrap();
    works(&mut domain);
}

fn results_of_many_calls_do_not_fill_the_heap() {
    let mut domain = build(Domain::builder("results").heap_size(1 << 20));
    for round in 0..200 {
        let result = domain.call(|| vec![round as u8; 100_000]).unwrap();
        assert!(result.len() == 100_000 && result.iter().all(|byte| *byte == round as u8));
    }
}

fn empty_results_with_room_do_not_fill_the_heap() {
    let mut domain = build(Domain::builder("capacity").heap_size(1 << 20));
    for _ in 0..200 {
        assert!(domain.call(|| Vec::<u8>::with_capacity(100_000)).unwrap().is_empty());
    }
}

fn a_thread_that_blocks_every_signal() {
    drop(domain("first"));
    let blocked = std::thread::spawn(|| {
        // SAFETY: the set is filled before it is used.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        }
        let mut domain = Domain::builder("blocked").build().unwrap();
        contain(&mut domain, mistake);
    });
    blocked.join().unwrap();
}

fn a_program_with_a_signal_stack_of_its_own() {
    let mut domain = domain("stack");
    let stack = vec![0u8; 256 * 1024].leak();
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    let status = support::in_child(|| {
        // SAFETY: the stack is leaked.
        assert_eq!(unsafe { libc::sigaltstack(&raw const new, std::ptr::null_mut()) }, 0);
        contain(&mut domain, mistake);
    });
    assert_eq!(status, 0);
}

fn locked_memory_is_discarded_from_any_thread() {
    let mut domain = build(Domain::builder("locked").heap_size(1 << 20));
    // SAFETY: the call touches no memory of ours.
    assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
    contain(&mut domain, mistake);
    let place = domain.call(|| vec![0x77_u8; 1000].leak().as_ptr() as usize).unwrap();
    let mut domain = std::thread::spawn(move || {
        domain.discard();
        domain
    })
    .join()
    .unwrap();
    // SAFETY: the place is in the domain's heap.
    let read = || unsafe { std::slice::from_raw_parts(place as *const u8, 1000) }.contains(&0x77);
    assert!(!domain.call(read).unwrap());
    contain(&mut domain, mistake);
}

/// Compresses something; returns zlib's result and the size. zlib, which Debian links lazily, calls malloc and memcpy
/// through slots that nothing has bound before: unbound, the first call would have the loader write what a domain may
/// not.
fn compress_something() -> (i32, u64) {
    #[link(name = "z")]
    unsafe extern "C" {
        fn compress(out: *mut u8, out_size: *mut libc::c_ulong, data: *const u8, size: libc::c_ulong) -> libc::c_int;
    }
    let (data, mut out) = ([7u8; 5000], vec![0u8; 5000]);
    let mut size = out.len() as libc::c_ulong;
    // SAFETY: both buffers are as long as is said.
    let result = unsafe { compress(out.as_mut_ptr(), &raw mut size, data.as_ptr(), data.len() as libc::c_ulong) };
    (result, size)
}

fn a_library_that_binds_lazily_works_at_once() {
    let mut domain = domain("lazy");
    let (result, size) = domain.call(compress_something).unwrap();
    assert!(result == 0 && size < 100, "{result}, {size} bytes");
    assert_eq!(compress_something(), (result, size), "control");
}

fn a_library_that_binds_lazily_is_given_away() {
    // SAFETY: nothing else uses the library while the domain lives.
    let mut domain = build(unsafe { Domain::builder("lazy").library("libz.so") });
    for _ in 0..2 {
        assert_eq!(domain.call(compress_something).unwrap().0, 0);
        contain(&mut domain, mistake);
    }
    // Binding others does not look at what the domain has, also when its key is another's.
    let others: Vec<_> = (0..20).map(|_| support::domain("other")).collect();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let library = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|file| file.contains("libz.so"));
    let copy = std::env::temp_dir().join(format!("libcopy-{}.so", std::process::id()));
    std::fs::create_dir_all(std::env::temp_dir()).unwrap();
    std::fs::copy(library.unwrap(), &copy).unwrap();
    let name = std::ffi::CString::new(copy.to_str().unwrap()).unwrap();
    // SAFETY: the library has no initialisers that could do harm.
    assert!(!unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) }.is_null());
    std::fs::remove_file(&copy).unwrap();
    works(&mut support::domain("later"));
    drop(others);
    assert_eq!(domain.call(compress_something).unwrap().0, 0);
    drop(domain);
    assert_eq!(compress_something().0, 0);
}

fn a_call_from_a_signal_handler() {
    use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
    static DOMAIN: AtomicPtr<Domain> = AtomicPtr::new(std::ptr::null_mut());
    static ANSWER: AtomicU32 = AtomicU32::new(0);
    extern "C" fn handler(_: i32) {
        // SAFETY: the test uses the domain only here meanwhile.
        let domain = unsafe { &mut *DOMAIN.load(Ordering::Relaxed) };
        ANSWER.store(domain.call(|| 7u32).unwrap_or(0), Ordering::Relaxed);
    }
    let mut domain = domain("handler");
    works(&mut domain);
    DOMAIN.store(&raw mut domain, Ordering::Relaxed);
    // The handler starts with rights to key 0 alone.
    // SAFETY: it is called at once, on this thread, at no bad moment.
    unsafe {
        libc::signal(libc::SIGUSR1, handler as *const () as usize);
        libc::raise(libc::SIGUSR1);
    }
    assert_eq!(ANSWER.load(Ordering::Relaxed), 7);
    works(&mut domain);
}

fn a_result_that_lies_on_the_stack_is_not_freed() {
    let mut domain = domain("stack");
    let forge = || {
        let bytes = std::mem::ManuallyDrop::new([7u8; 32]);
        // SAFETY: none: the vector's memory is no block.
        unsafe { Vec::from_raw_parts(std::hint::black_box(bytes.as_ptr().cast_mut()), 32, 32) }
    };
    assert_eq!(domain.call(forge).unwrap().len(), 32);
    works(&mut domain);
}

fn the_children_of_a_fork_have_domains_that_work() {
    let mut domain = domain("parent");
    works(&mut domain);
    let status = support::in_child(|| {
        contain(&mut domain, mistake);
        contain(&mut Domain::builder("child").build().unwrap(), mistake);
    });
    assert_eq!(status, 0);
    contain(&mut domain, mistake);
}

fn a_domain_cannot_make_or_call_another() {
    let mut outer = domain("outer");
    let inner = std::sync::Mutex::new(Domain::builder("inner").build().unwrap());
    let refused = outer.call(|| Domain::builder("nested").build().is_err_and(|error| error == Error::InDomain));
    assert!(refused.unwrap());
    let refused = outer.call(|| pkru_userspace::capability::detect().is_err_and(|error| error == Error::InDomain));
    assert!(refused.unwrap());
    // Locking writes to the caller's memory; a pointer gets around that, to the call itself.
    let place = inner.lock().unwrap().key().unwrap().number();
    let pointer = std::ptr::from_ref(&inner) as usize;
    let nested = outer.call(|| {
        // SAFETY: none: the domain is borrowed from under its lock.
        let inner = unsafe { &mut *(*(pointer as *mut std::sync::Mutex<Domain>)).get_mut().unwrap() };
        let violation = inner.call(|| 7u8).unwrap_err();
        (violation.to_string(), inner.key().unwrap().number())
    });
    let (message, key) = nested.unwrap();
    assert!(message.contains("cannot make or call another"), "{message}");
    assert_eq!(key, place);
    works(&mut outer);
    contain(&mut outer, mistake);
    works(&mut inner.into_inner().unwrap());
}

fn a_call_from_a_thread_locals_destructor() {
    struct Caller(std::cell::Cell<Option<Domain>>);
    impl Drop for Caller {
        fn drop(&mut self) {
            let mut domain = self.0.take().unwrap();
            works(&mut domain);
            contain(&mut domain, mistake);
        }
    }
    thread_local! { static CALLER: Caller = const { Caller(std::cell::Cell::new(None)) } }
    let domain = domain("late");
    std::thread::spawn(move || CALLER.with(|caller| caller.0.set(Some(domain)))).join().unwrap();
    works(&mut Domain::builder("after").build().unwrap());
}
