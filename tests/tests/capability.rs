//! The capability survey: its findings agree with other sources, and it leaves nothing behind.

use std::sync::atomic::{AtomicBool, Ordering};

use pkru_userspace::capability::{Finding, Found, Missing, Rseq, SignalFrame, Subject, Survey, detect, survey};
use pkru_userspace::{Domain, Error, Region};
use support::{domain, suite, works};

suite! {
    #[anywhere] cpu_and_kernel_are_what_proc_says,
    #[anywhere] the_kernels_features_are_those_of_its_version,
    keys_and_signals_are_those_of_this_kernel,
    #[anywhere] without_keys_what_needs_them_is_not_tried,
    #[anywhere] each_finding_has_a_method_and_a_consequence_and_a_place_in_the_table,
    #[anywhere] nothing_is_left_behind,
    among_domains_and_threads,
    in_a_domain_nothing_is_tried,
    a_handler_or_a_region_of_the_program_is_not_in_the_way,
    #[anywhere] what_a_policy_refuses_is_not_available,
    a_policy_that_refuses_keys,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn flag(name: &str) -> bool {
    read("/proc/cpuinfo").split_whitespace().any(|flag| flag == name)
}

/// The kernel's version, as two numbers.
fn kernel() -> (u32, u32) {
    let release = read("/proc/sys/kernel/osrelease");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn state(survey: &Survey, subject: Subject) -> Result<Found, Missing> {
    survey.look_up(subject).unwrap().cloned().map_err(Clone::clone)
}

/// Returns whether the calling thread has a registered rseq area. The kernel writes the CPU number there.
fn has_rseq() -> bool {
    // SAFETY: the name is NUL-terminated.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) }.cast::<isize>();
    if offset.is_null() {
        return false;
    }
    let thread: usize;
    // SAFETY: the ABI puts the thread pointer at FS:0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread) };
    // SAFETY: glibc defines the symbol as a `ptrdiff_t`.
    let area = thread.wrapping_add_signed(unsafe { *offset });
    let cpu_id = (area as *const i32).wrapping_add(1);
    // SAFETY: the area is in the thread's descriptor. This is its second word, negative if it is not registered.
    (unsafe { cpu_id.read_volatile() }) >= 0
}

/// Returns how many keys this process can allocate. It frees them again.
fn count_keys() -> usize {
    // SAFETY: the call touches no memory.
    let taken: Vec<_> = (0..20).map(|_| unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }).collect();
    let taken: Vec<_> = taken.into_iter().filter(|key| *key > 0).collect();
    for key in &taken {
        // SAFETY: the key was just allocated and tags nothing.
        unsafe { libc::syscall(libc::SYS_pkey_free, *key) };
    }
    taken.len()
}

fn cpu_and_kernel_are_what_proc_says() {
    let survey = survey();
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let cpu = format!("{} {}", field("vendor_id"), field("model name"));
    assert_eq!(state(&survey, Subject::Cpu), Ok(Found::Text(cpu)));
    let release = read("/proc/sys/kernel/osrelease").trim().to_string();
    assert_eq!(state(&survey, Subject::Kernel), Ok(Found::Text(release)));
    for (subject, name) in [(Subject::Pku, "pku"), (Subject::Ospke, "ospke"), (Subject::Fsgsbase, "fsgsbase")] {
        assert_eq!(state(&survey, subject).is_ok(), flag(name), "{subject}");
    }
    assert_eq!(survey.capability(), detect());
}

fn the_kernels_features_are_those_of_its_version() {
    let survey = survey();
    // Since Linux 5.11, in every configuration.
    assert_eq!(state(&survey, Subject::SyscallUserDispatch), Ok(Found::Available));
    let sealed = if kernel() >= (6, 10) { Ok(Found::Available) } else { Err(Missing::Refused(libc::ENOSYS)) };
    assert_eq!(state(&survey, Subject::Mseal), sealed);
    // Since Linux 5.14 if `secretmem.enable` is set. Since 6.5 by default.
    let asked = read("/proc/cmdline");
    let secret = match asked.split_whitespace().find_map(|word| word.strip_prefix("secretmem.enable=")) {
        Some(value) => matches!(value, "1" | "y" | "Y"),
        None => kernel() >= (6, 5),
    };
    let secret = if secret { Ok(Found::Available) } else { Err(Missing::Refused(libc::ENOSYS)) };
    assert_eq!(state(&survey, Subject::MemfdSecret), secret);
    let rseq = if has_rseq() { Rseq::CanBeUnregistered } else { Rseq::NotRegistered };
    assert_eq!(state(&survey, Subject::Rseq), Ok(Found::Rseq(rseq)));
}

fn keys_and_signals_are_those_of_this_kernel() {
    drop(domain("first"));
    let survey = survey();
    let frame = if kernel() >= (6, 12) { SignalFrame::OnAnyStack } else { SignalFrame::OnWritableStack };
    assert_eq!(state(&survey, Subject::SignalFrame), Ok(Found::SignalFrame(frame)));
    let Ok(Found::Keys { total, left }) = state(&survey, Subject::Keys) else { panic!("{survey}") };
    assert!((13..=15).contains(&total), "{total}");
    assert_eq!(left, count_keys());
    let Ok(Found::Offset(offset)) = state(&survey, Subject::PkruInFrame) else { panic!("{survey}") };
    assert_eq!(offset, std::arch::x86_64::__cpuid_count(0xd, 9).ebx as usize);
}

fn without_keys_what_needs_them_is_not_tried() {
    if flag("ospke") {
        assert!(survey().findings().iter().all(|finding| !matches!(finding.state(), Err(Missing::NotTried(_)))));
        return;
    }
    let survey = survey();
    let error = survey.capability().unwrap_err();
    assert_eq!(error, if flag("pku") { Error::PkuOff } else { Error::NoPku });
    for subject in [Subject::Keys, Subject::PkruInFrame, Subject::SignalFrame] {
        assert_eq!(state(&survey, subject), Err(Missing::NotTried(error.clone())), "{subject}");
    }
}

fn each_finding_has_a_method_and_a_consequence_and_a_place_in_the_table() {
    let survey = survey();
    let table = survey.to_string();
    assert_eq!(survey.findings().len(), 12);
    for finding in survey.findings() {
        assert!(table.lines().any(|line| line.starts_with(&finding.subject().to_string())), "{table}");
        assert!(!finding.method().is_empty());
        let consequence = finding.consequence();
        assert!(consequence.ends_with('.') && table.contains(consequence), "{consequence}");
    }
    println!("{table}");
}

fn nothing_is_left_behind() {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let keyed = flag("ospke");
    let rights = || {
        // SAFETY: PKU is switched on.
        if keyed { unsafe { pkru_rights() } } else { 0 }
    };
    let mask = || {
        // SAFETY: a signal set is a C struct of integers, for which zero is valid.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is writable.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set) };
        // SAFETY: the set is writable, and the signal exists.
        (1..=64).map(|signal| unsafe { libc::sigismember(&raw const set, signal) }).collect::<Vec<_>>()
    };
    let look = || {
        let handlers: Vec<_> = [libc::SIGILL, libc::SIGSEGV, libc::SIGSYS, libc::SIGUSR1].map(handler).into();
        let maps = read("/proc/self/maps").lines().count();
        (count("/proc/self/fd"), maps, count("/proc/self/task"), count_keys(), rights(), handlers, mask(), has_rseq())
    };
    // The first survey can make the allocator map memory that it keeps.
    drop(survey());
    look();
    let before = look();
    for _ in 0..3 {
        let _ = survey();
    }
    assert_eq!(look(), before);
    // SAFETY: the status pointer may be null.
    let left = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
    assert!(left == -1, "child {left} is left");
}

/// Reads PKRU.
///
/// # Safety
///
/// PKU is switched on.
unsafe fn pkru_rights() -> u32 {
    let rights;
    // SAFETY: the caller guarantees that PKU is switched on.
    unsafe { std::arch::asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _) };
    rights
}

/// Returns the kernel's action for a signal.
fn handler(signal: i32) -> [u64; 4] {
    let mut action = [0; 4];
    // SAFETY: the array has room for the kernel's struct of four words.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0, action.as_mut_ptr(), 8) };
    action
}

fn among_domains_and_threads() {
    let mut first = domain("first");
    works(&mut first);
    let alone = survey();
    // The first call unregisters this thread's rseq area.
    assert_eq!(state(&alone, Subject::Rseq), Ok(Found::Rseq(Rseq::NotRegistered)));
    let total = |survey: &Survey| match state(survey, Subject::Keys) {
        Ok(Found::Keys { total, left }) => (total, left),
        other => panic!("{other:?}"),
    };
    // More domains than keys, so that no key is left.
    let mut domains: Vec<_> = (0..20).map(|_| Domain::builder("many").build().unwrap()).collect();
    domains.iter_mut().for_each(works);
    let many = survey();
    assert_eq!(total(&many), (total(&alone).0, 0));
    let frames = [&alone, &many].map(|survey| state(survey, Subject::SignalFrame));
    assert_eq!(frames[0], frames[1]);
    assert_eq!(many.capability(), alone.capability());

    // On a thread that has not called a domain, while another thread does.
    static STOP: AtomicBool = AtomicBool::new(false);
    let busy = std::thread::spawn(|| {
        let mut domain = Domain::builder("busy").build().unwrap();
        while !STOP.load(Ordering::Relaxed) {
            works(&mut domain);
        }
    });
    let (fresh, registered) = std::thread::spawn(|| (survey(), has_rseq())).join().unwrap();
    let rseq = if registered { Rseq::CanBeUnregistered } else { Rseq::NotRegistered };
    assert_eq!(state(&fresh, Subject::Rseq), Ok(Found::Rseq(rseq)));
    let others = |survey: &Survey| {
        let differs = |finding: &&Finding| finding.subject() != Subject::Rseq;
        survey.findings().iter().filter(differs).cloned().collect::<Vec<_>>()
    };
    assert_eq!(others(&fresh), others(&many));
    STOP.store(true, Ordering::Relaxed);
    busy.join().unwrap();
    domains.iter_mut().for_each(works);
}

fn in_a_domain_nothing_is_tried() {
    let mut domain = domain("curious");
    let seen = domain.call(|| {
        let survey = survey();
        let refused = survey.capability() == Err(Error::InDomain);
        (refused, survey.findings().len(), survey.to_string())
    });
    let expected = format!("nothing was tried: {}\n", Error::InDomain);
    assert_eq!(seen.unwrap(), (true, 0, expected));
    works(&mut domain);
}

fn a_handler_or_a_region_of_the_program_is_not_in_the_way() {
    extern "C" fn never(_: i32) {
        std::process::abort();
    }
    drop(domain("first"));
    let plain = survey();
    let region = Region::new(4096);
    for signal in [libc::SIGILL, libc::SIGSEGV, libc::SIGSYS, libc::SIGUSR1] {
        // SAFETY: the handler aborts and does nothing else.
        unsafe { libc::signal(signal, never as *const () as libc::sighandler_t) };
    }
    // A fault whose signal is blocked kills the process, even if the signal has a handler.
    // SAFETY: a signal set is a C struct of integers, for which zero is valid.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: the set lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) };
    let now = survey();
    for subject in plain.findings().iter().map(Finding::subject).filter(|subject| *subject != Subject::Keys) {
        assert_eq!(state(&now, subject), state(&plain, subject), "{subject}");
    }
    drop(region);
}

/// Installs a seccomp filter that refuses one system call on the calling thread. It cannot be removed.
fn refuse(call: libc::c_long, errno: i32) {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let instruction = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    let mut filter = [
        // The system call number is the first word of `struct seccomp_data`.
        instruction(LOAD_WORD, 0, 0),
        libc::sock_filter { jf: 1, ..instruction(JUMP_EQUAL, 0, call as u32) },
        instruction(RETURN, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the call touches no memory.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program lives across the call.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) }, 0);
}

fn what_a_policy_refuses_is_not_available() {
    let before = survey();
    let calls = [
        (libc::SYS_prctl, Subject::SyscallUserDispatch),
        (libc::SYS_memfd_secret, Subject::MemfdSecret),
        (462, Subject::Mseal),
        (libc::SYS_pkey_alloc, Subject::Keys),
        (libc::SYS_clone, Subject::Fsgsbase),
    ];
    for (call, refused) in calls {
        // Each on its own thread, because a filter cannot be removed.
        let survey = std::thread::spawn(move || {
            refuse(call, libc::EPERM);
            survey()
        });
        let survey = survey.join().unwrap();
        for finding in survey.findings() {
            let subject = finding.subject();
            let old = state(&before, subject);
            let expected = match state(&survey, subject) {
                // Some tests need a child process. Before Linux 6.12 the test of signal frames needs a key.
                Err(Missing::NotTried(Error::System { errno: libc::EPERM, .. })) => {
                    call == libc::SYS_clone || (call == libc::SYS_pkey_alloc && subject == Subject::SignalFrame)
                }
                Err(Missing::NotTried(_)) => matches!(old, Err(Missing::NotTried(_))),
                Err(Missing::Refused(libc::EPERM)) => subject == refused,
                // The test's own thread may have called a domain, which unregisters rseq. This thread has not.
                other => other == old || subject == Subject::Rseq,
            };
            assert!(expected, "{call}: {finding:?}");
        }
        let told = state(&survey, refused).unwrap_err();
        let untried = matches!(told, Missing::NotTried(_));
        assert!(untried || told == Missing::Refused(libc::EPERM), "{call}: {told:?}");
    }
}

fn a_policy_that_refuses_keys() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let refused = std::thread::spawn(move || {
            refuse(libc::SYS_pkey_alloc, errno);
            (detect().unwrap_err(), Domain::builder("refused").build().unwrap_err())
        });
        let (told, met) = refused.join().unwrap();
        assert_eq!((&told, &met), (&Error::KeysRefused { errno }, &Error::KeysRefused { errno }));
        assert!(told.to_string().contains("seccomp"), "{told}");
    }
    works(&mut domain("on another thread"));
    // The process is ready now, and a domain is not: there are two keys, and both are in use.
    pkru_userspace::set_key_limit(15);
    let refused = std::thread::spawn(|| {
        refuse(libc::SYS_pkey_alloc, libc::EPERM);
        let domains: Result<Vec<_>, _> = (0..20).map(|_| Domain::builder("more").build()).collect();
        domains.map(drop)
    });
    assert_eq!(refused.join().unwrap(), Err(Error::KeysRefused { errno: libc::EPERM }));
}
