//! Code in a domain that opens and closes descriptors, or calls functions that act on the whole process.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::ptr::{null, null_mut};

use pkru_userspace::{Domain, ViolationKind};
use support::{contain, domain, mistake, open_domain, suite, works};

suite! {
    what_a_domain_opens_it_closes,
    what_a_domain_opens_is_closed_by_a_discard,
    a_socket_that_lingers_does_not_hold_a_discard_up,
    the_programs_descriptors_are_not_closed,
    a_double_close,
    another_domains_descriptors_are_not_closed,
    descriptors_that_the_program_closes,
    streams_and_folders,
    the_standard_library_opens_files_in_a_domain,
    a_child_that_shares_memory_redirects_its_output,
    a_forked_child_closes_descriptors,
    other_processes_and_threads_are_not_signalled,
    its_own_thread_is_signalled,
    the_process_keeps_its_attributes,
    no_alarm_is_set,
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

fn is_open(descriptor: c_int) -> bool {
    // SAFETY: the command changes nothing.
    unsafe { libc::fcntl(descriptor, libc::F_GETFD) >= 0 }
}

fn close(descriptor: c_int) -> (c_int, i32) {
    // SAFETY: the tests close what they have opened, or the call is to fail.
    let result = unsafe { libc::close(descriptor) };
    (result, if result == 0 { 0 } else { errno() })
}

fn event() -> c_int {
    // SAFETY: the call touches no memory.
    unsafe { libc::eventfd(0, 0) }
}

/// Opens one descriptor or two, in the numbered way.
fn open(way: usize) -> Vec<c_int> {
    unsafe extern "C" {
        fn __open_2(path: *const libc::c_char, flags: c_int) -> c_int;
        fn open64(path: *const libc::c_char, flags: c_int, ...) -> c_int;
        fn fcntl64(descriptor: c_int, command: c_int, ...) -> c_int;
    }
    let path = c"/proc/self/exe".as_ptr();
    let mut pair = [-1; 2];
    // SAFETY: the arguments are valid.
    let one = unsafe {
        match way {
            0 => libc::open(path, libc::O_RDONLY),
            1 => libc::openat(libc::AT_FDCWD, path, libc::O_RDONLY),
            2 => open64(path, libc::O_RDONLY),
            3 => __open_2(path, libc::O_RDONLY),
            4 => libc::dup(2),
            5 => libc::fcntl(2, libc::F_DUPFD_CLOEXEC, 20),
            6 => fcntl64(2, libc::F_DUPFD, 20),
            7 => libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0),
            8 => event(),
            9 => libc::epoll_create1(0),
            10 => libc::timerfd_create(libc::CLOCK_MONOTONIC, 0),
            11 => libc::inotify_init1(0),
            12 => libc::memfd_create(c"name".as_ptr(), 0),
            13 => libc::dup2(2, 30),
            14 => libc::dup3(2, 31, libc::O_CLOEXEC),
            15 => {
                let mut mask = std::mem::zeroed();
                libc::sigemptyset(&raw mut mask);
                libc::signalfd(-1, &raw const mask, 0)
            }
            16 => libc::creat(c"/tmp/pkru_descriptors".as_ptr(), 0o600),
            17 => {
                let mut template = *b"/tmp/pkru_XXXXXX\0";
                libc::mkstemp(template.as_mut_ptr().cast())
            }
            18 => libc::posix_openpt(libc::O_RDWR),
            19 => libc::pipe(pair.as_mut_ptr()),
            20 => libc::pipe2(pair.as_mut_ptr(), libc::O_CLOEXEC),
            _ => libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()),
        }
    };
    if pair == [-1; 2] { vec![one] } else { pair.to_vec() }
}

const WAYS: usize = 22;

fn what_a_domain_opens_it_closes() {
    let mut domain = domain("opener");
    std::fs::create_dir_all("/tmp").unwrap();
    for way in 0..WAYS {
        // The control finds the ways that there are here.
        let control = open(way);
        if control.contains(&-1) {
            println!("way {way} is not there: {}", errno());
            continue;
        }
        control.iter().for_each(|descriptor| assert_eq!(close(*descriptor), (0, 0)));
        let opened = domain.call(|| open(way)).unwrap();
        assert!(opened.iter().all(|descriptor| is_open(*descriptor)), "way {way}: {opened:?}");
        for descriptor in opened {
            assert_eq!(domain.call(|| close(descriptor)).unwrap(), (0, 0), "way {way}");
            assert!(!is_open(descriptor), "way {way}");
            assert_eq!(domain.call(|| close(descriptor)).unwrap(), (-1, libc::EBADF), "way {way}");
        }
    }
}

fn what_a_domain_opens_is_closed_by_a_discard() {
    let mut domain = domain("opener");
    std::fs::create_dir_all("/tmp").unwrap();
    let mut all = Vec::new();
    for way in 0..WAYS {
        let control = open(way);
        if !control.contains(&-1) {
            control.into_iter().for_each(|descriptor| assert_eq!(close(descriptor), (0, 0)));
            all.extend(domain.call(|| open(way)).unwrap());
        }
    }
    assert!(all.len() > 15 && all.iter().all(|descriptor| is_open(*descriptor)));
    contain(&mut domain, mistake);
    assert!(!all.iter().any(|descriptor| is_open(*descriptor)));
    let again = domain.call(|| open(0)[0]).unwrap();
    domain.discard();
    assert!(!is_open(again));
    let again = domain.call(|| open(0)[0]).unwrap();
    drop(domain);
    assert!(!is_open(again));
}

fn a_socket_that_lingers_does_not_hold_a_discard_up() {
    use std::net::TcpListener;
    // A guest's loopback interface is down at first. Elsewhere this may fail, and is not needed.
    // SAFETY: the request is a C struct of integers, and names an interface.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..2].copy_from_slice(&[b'l' as _, b'o' as _]);
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &raw const request);
        libc::close(socket);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // The peer reads nothing, so a close waits for data to be sent.
    let fill = || {
        // SAFETY: the arguments are valid.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            let linger = libc::linger { l_onoff: 1, l_linger: 20 };
            let size = size_of::<libc::linger>() as u32;
            assert_eq!(
                libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size),
                0
            );
            let mut address: libc::sockaddr_in = std::mem::zeroed();
            address.sin_family = libc::AF_INET as u16;
            address.sin_port = port.to_be();
            address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
            let size = size_of::<libc::sockaddr_in>() as u32;
            assert_eq!(libc::connect(socket, (&raw const address).cast(), size), 0);
            let bytes = [0u8; 4096];
            while libc::send(socket, bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) > 0 {}
        }
        mistake();
    };
    let mut domain = domain("lingerer");
    let violation = domain.call(fill).unwrap_err();
    assert!(matches!(violation.kind(), ViolationKind::Null { .. }), "{violation}");
    let start = std::time::Instant::now();
    works(&mut domain);
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
}

fn the_programs_descriptors_are_not_closed() {
    unsafe extern "C" {
        fn close_range(first: u32, last: u32, flags: c_int) -> c_int;
        fn closefrom(first: c_int);
    }
    let (ours, other) = (event(), event());
    for mut domain in [domain("closed"), open_domain("open")] {
        for descriptor in [0, 1, 2, ours] {
            assert_eq!(domain.call(|| close(descriptor)).unwrap(), (-1, libc::EPERM));
        }
        // SAFETY: the calls are to fail.
        let replace = || unsafe { (libc::dup2(other, ours), errno(), libc::dup3(other, ours, 0), errno()) };
        assert_eq!(domain.call(replace).unwrap(), (-1, libc::EPERM, -1, libc::EPERM));
        // SAFETY: as above.
        let all = || unsafe {
            closefrom(3);
            (close_range(3, u32::MAX, 0), errno())
        };
        assert_eq!(domain.call(all).unwrap(), (-1, libc::EPERM));
        // Duplicates that need no room are fine, and what is wrong otherwise fails as elsewhere.
        // SAFETY: the calls close nothing.
        let others = || unsafe {
            let same = libc::dup2(ours, ours);
            (same, libc::dup2(-1, 50), errno(), libc::dup3(ours, ours, 0), errno(), libc::dup2(ours, -1), errno())
        };
        let expected = (ours, -1, libc::EBADF, -1, libc::EINVAL, -1, libc::EBADF);
        assert_eq!(domain.call(others).unwrap(), expected);
        assert!([0, 1, 2, ours, other].into_iter().all(is_open));
        works(&mut domain);
    }
    // SAFETY: the descriptors are this test's.
    assert_eq!(unsafe { libc::dup2(other, ours) }, ours, "control");
    assert_eq!((close(ours), close(other)), ((0, 0), (0, 0)), "control");
}

fn a_double_close() {
    let mut domain = domain("double");
    let descriptor = domain.call(event).unwrap();
    assert_eq!(domain.call(|| close(descriptor)).unwrap(), (0, 0));
    let ours = event();
    assert_eq!(ours, descriptor, "the number is used again");
    assert_eq!(domain.call(|| close(descriptor)).unwrap(), (-1, libc::EPERM));
    contain(&mut domain, mistake);
    assert!(is_open(ours));
}

fn another_domains_descriptors_are_not_closed() {
    let (mut one, mut other) = (domain("one"), domain("other"));
    let descriptor = one.call(event).unwrap();
    assert_eq!(other.call(|| close(descriptor)).unwrap(), (-1, libc::EPERM));
    other.discard();
    assert!(is_open(descriptor));
    assert_eq!(one.call(|| close(descriptor)).unwrap(), (0, 0));
}

fn descriptors_that_the_program_closes() {
    let mut domain = domain("generous");
    // It hands a descriptor out. The program closes it, and gets another file with the same number.
    let close_it: [fn(c_int); 3] = [
        |descriptor| assert_eq!(close(descriptor), (0, 0)),
        // SAFETY: the descriptor is the test's.
        |descriptor| assert_eq!(unsafe { libc::dup2(event(), descriptor) }, descriptor),
        // The kernel closes it, and this crate does not see that.
        // SAFETY: as above.
        |descriptor| assert_eq!(unsafe { libc::syscall(libc::SYS_close, descriptor) }, 0),
    ];
    for close_it in close_it {
        let descriptor = domain.call(event).unwrap();
        close_it(descriptor);
        if !is_open(descriptor) {
            assert_eq!(event(), descriptor, "the number is used again");
        }
        assert_eq!(domain.call(|| close(descriptor)).unwrap(), (-1, libc::EPERM));
        contain(&mut domain, mistake);
        assert!(is_open(descriptor));
        domain.discard();
        assert!(is_open(descriptor));
    }
}

fn streams_and_folders() {
    let list = || {
        // SAFETY: the arguments are valid.
        unsafe {
            let folder = libc::opendir(c"/proc/self".as_ptr());
            let descriptor = libc::dirfd(folder);
            assert!(!libc::readdir(folder).is_null());
            (descriptor, libc::closedir(folder))
        }
    };
    let mut domain = domain("lister");
    let (descriptor, result) = domain.call(list).unwrap();
    assert!(result == 0 && !is_open(descriptor));
    assert_eq!(event(), descriptor, "the number is used again");
    domain.discard();
    assert!(is_open(descriptor));
    // SAFETY: the path is a C string.
    let left = domain.call(|| unsafe { libc::dirfd(libc::opendir(c"/proc/self".as_ptr())) }).unwrap();
    assert!(is_open(left));
    domain.discard();
    assert!(!is_open(left));

    let mut open = open_domain("reader");
    let read = || {
        // SAFETY: the arguments are valid.
        unsafe {
            let descriptor = libc::open(c"/proc/self/stat".as_ptr(), libc::O_RDONLY);
            let file = libc::fdopen(descriptor, c"r".as_ptr());
            let first = libc::fgetc(file);
            (descriptor, i32::from(first > 0), libc::fclose(file))
        }
    };
    let (descriptor, is_read, result) = open.call(read).unwrap();
    assert!(is_read == 1 && result == 0 && !is_open(descriptor));
    assert_eq!(event(), descriptor, "the number is used again");
    open.discard();
    assert!(is_open(descriptor));
}

fn the_standard_library_opens_files_in_a_domain() {
    let mut domain = domain("std");
    let read = || {
        let mut file = std::fs::File::open("/proc/self/stat").unwrap();
        let mut copy = file.try_clone().unwrap();
        let mut bytes = [0; 2];
        file.read_exact(&mut bytes[..1]).unwrap();
        copy.read_exact(&mut bytes[1..]).unwrap();
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&bytes).unwrap();
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        let count = std::fs::read_dir("/proc/self/fd").unwrap().count();
        (all.len() as u64, count as u64)
    };
    let (length, count) = domain.call(read).unwrap();
    assert_eq!(length, 2);
    for _ in 0..50 {
        assert_eq!(domain.call(read).unwrap(), (2, count), "none is left over");
    }
}

fn vfork_and(function: extern "C" fn() -> c_int) -> c_int {
    unsafe extern "C" {
        fn helper_vfork_and(function: extern "C" fn() -> c_int) -> c_int;
    }
    // SAFETY: the child runs the function and exits.
    unsafe { helper_vfork_and(function) }
}

fn a_child_that_shares_memory_redirects_its_output() {
    /// What code does between vfork(2) and execve(2).
    extern "C" fn redirect() -> c_int {
        // SAFETY: the arguments are valid, and the child has descriptors and attributes of its own.
        unsafe {
            let file = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            let is_redirected = libc::dup2(file, 1) == 1 && libc::close(file) == 0 && libc::close(0) == 0;
            let is_elsewhere = libc::chdir(c"/proc".as_ptr()) == 0 && libc::setsid() > 0;
            c_int::from(is_redirected) | c_int::from(is_elsewhere) << 1
        }
    }
    let folder = std::env::current_dir().unwrap();
    assert_eq!(vfork_and(redirect), 3 << 8, "control");
    for mut domain in [domain("closed"), open_domain("open")] {
        let descriptor = domain.call(event).unwrap();
        assert_eq!(domain.call(|| vfork_and(redirect)).unwrap(), 3 << 8);
        assert!([0, 1, 2, descriptor].into_iter().all(is_open));
        assert_eq!(domain.call(|| close(descriptor)).unwrap(), (0, 0));
        contain(&mut domain, mistake);
    }
    assert_eq!(std::env::current_dir().unwrap(), folder);
}

fn a_forked_child_closes_descriptors() {
    let mut domain = domain("parent");
    let (ours, its) = (event(), domain.call(event).unwrap());
    let domain = std::cell::RefCell::new(domain);
    let status = support::in_child(|| {
        let mut domain = domain.borrow_mut();
        assert_eq!(close(ours), (0, 0));
        assert_eq!(domain.call(|| close(its)).unwrap(), (0, 0));
        assert_eq!(domain.call(|| close(2)).unwrap(), (-1, libc::EPERM));
        works(&mut domain);
    });
    assert_eq!(status, 0);
    assert!(is_open(ours) && is_open(its));
}

fn other_processes_and_threads_are_not_signalled() {
    unsafe extern "C" {
        fn tgkill(process: c_int, thread: c_int, signal: c_int) -> c_int;
        fn pidfd_open(process: c_int, flags: u32) -> c_int;
    }
    let mut child = std::process::Command::new("/proc/self/exe").arg("--list").spawn().unwrap();
    let number = child.id().cast_signed();
    // SAFETY: the call touches no memory.
    let parent = unsafe { libc::getppid() };
    for mut domain in [domain("closed"), open_domain("open")] {
        for process in [number, parent, 0, -1, -number, 1] {
            // SAFETY: the calls are to fail.
            let kill = || unsafe { (libc::kill(process, libc::SIGKILL), errno()) };
            assert_eq!(domain.call(kill).unwrap(), (-1, libc::EPERM), "{process}");
        }
        // SAFETY: as above.
        let others = || unsafe {
            let value = libc::sigval { sival_ptr: null_mut() };
            [libc::killpg(0, libc::SIGKILL), tgkill(number, number, libc::SIGKILL), libc::sigqueue(number, 9, value)]
        };
        assert_eq!(domain.call(others).unwrap(), [-1; 3]);
        // SAFETY: signal 0 sends nothing.
        assert_eq!(domain.call(|| unsafe { libc::kill(libc::getpid(), 0) }).unwrap(), 0);
        // SAFETY: the call only opens a descriptor.
        let descriptor = domain.call(|| unsafe { pidfd_open(libc::getpid(), 0) }).unwrap();
        assert!(descriptor >= 0);
        works(&mut domain);
    }
    // SAFETY: the child is this test's, and not waited for.
    assert_eq!(unsafe { libc::kill(number, libc::SIGKILL) }, 0, "control");
    child.wait().unwrap();
}

fn its_own_thread_is_signalled() {
    let mut domain = domain("own");
    // SAFETY: the call touches no memory, and the signal has no effect.
    assert_eq!(domain.call(|| unsafe { libc::kill(libc::getpid(), libc::SIGCONT) }).unwrap(), 0);
    let ways: [fn() -> c_int; 2] = [
        // SAFETY: as above.
        || unsafe { libc::raise(libc::SIGABRT) },
        // SAFETY: as above.
        || unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGABRT) },
    ];
    for way in ways {
        let violation = contain(&mut domain, || {
            way();
        });
        assert_eq!(*violation.kind(), ViolationKind::Abort, "{violation}");
    }
}

/// Attributes of the process, as text.
fn attributes() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let status = read("/proc/self/status");
    let lines = status.lines().filter(|line| ["Uid", "Gid", "Groups"].iter().any(|name| line.starts_with(name)));
    let status: Vec<_> = lines.map(String::from).collect();
    // SAFETY: the calls touch no memory.
    let numbers = unsafe { (libc::getsid(0), libc::getpgid(0), libc::getpriority(libc::PRIO_PROCESS, 0)) };
    let folder = std::env::current_dir().unwrap();
    format!("{} {status:?} {numbers:?} {folder:?}", read("/proc/self/limits"))
}

fn the_process_keeps_its_attributes() {
    unsafe extern "C" {
        fn prlimit64(process: c_int, resource: u32, new: *const c_void, old: *mut c_void) -> c_int;
    }
    let act = |what: usize| {
        let limit = libc::rlimit { rlim_cur: 50, rlim_max: 50 };
        // SAFETY: the arguments are valid.
        unsafe {
            match what {
                0 => libc::chdir(c"/proc".as_ptr()),
                1 => libc::fchdir(libc::open(c"/proc".as_ptr(), libc::O_RDONLY)),
                2 => libc::setrlimit(libc::RLIMIT_CORE, &raw const limit),
                3 => libc::prlimit(0, libc::RLIMIT_CORE, &raw const limit, null_mut()),
                4 => prlimit64(0, libc::RLIMIT_CORE, (&raw const limit).cast(), null_mut()),
                5 => libc::setpriority(libc::PRIO_PROCESS, 0, 5),
                6 => libc::nice(1) - 1,
                7 => libc::setgid(libc::getgid()),
                8 => libc::setuid(libc::getuid()),
                9 => libc::setpgid(0, 0),
                10 => libc::unshare(0),
                11 => libc::sethostname(c"abc".as_ptr(), 3),
                _ => libc::setreuid(libc::getuid(), libc::getuid()),
            }
        }
    };
    let before = attributes();
    for mut domain in [domain("closed"), open_domain("open")] {
        for what in 0..13 {
            let result = domain.call(|| (act(what), errno())).unwrap();
            assert_eq!((result.0.signum(), result.1), (-1, libc::EPERM), "act {what}");
        }
        let schedule = || {
            let parameters = libc::sched_param { sched_priority: 0 };
            // SAFETY: the parameters are readable.
            unsafe { libc::pthread_setschedparam(libc::pthread_self(), libc::SCHED_BATCH, &raw const parameters) }
        };
        assert_eq!(domain.call(schedule).unwrap(), libc::EPERM);
        // SAFETY: the call touches no memory.
        assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_OTHER);
        let get = || {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the struct is writable.
            unsafe { libc::prlimit(0, libc::RLIMIT_STACK, null(), &raw mut limit) }
        };
        assert_eq!(domain.call(get).unwrap(), 0, "reading a limit");
        works(&mut domain);
    }
    assert_eq!(attributes(), before);
    assert_eq!(act(0), 0, "control");
    assert_eq!(act(2), 0, "control");
    assert_ne!(attributes(), before, "control");
}

fn no_alarm_is_set() {
    let mut domain: Domain = domain("alarm");
    let act = || {
        // SAFETY: the arguments are valid.
        unsafe {
            let value = libc::timeval { tv_sec: 100, tv_usec: 0 };
            let new = libc::itimerval { it_interval: value, it_value: value };
            let mut timer = null_mut();
            let alarm = (libc::alarm(100), errno());
            [
                (alarm.0 as c_int, alarm.1),
                (libc::setitimer(libc::ITIMER_REAL, &raw const new, null_mut()), errno()),
                (libc::timer_create(libc::CLOCK_MONOTONIC, null_mut(), &raw mut timer), errno()),
            ]
            .map(|(result, errno)| i64::from(result) << 32 | i64::from(errno))
        }
    };
    let expected = [i64::from(libc::EPERM), -1 << 32 | i64::from(libc::EPERM), -1 << 32 | i64::from(libc::EPERM)];
    assert_eq!(domain.call(act).unwrap(), expected);
    // SAFETY: the call touches no memory.
    assert_eq!(unsafe { libc::alarm(0) }, 0, "none was set");
    // SAFETY: as above; nothing waits for it.
    assert_eq!(unsafe { (libc::alarm(100), libc::alarm(0)) }, (0, 100), "control");
}
