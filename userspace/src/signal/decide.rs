//! What to do about a signal: a pure function of what it has interrupted.

use pkru::ProtectionKey;
use pkru::rights::Access;

use super::trap::{DEADLINE, Interrupted, deadline_value};
use crate::inside::abort::AbortReason;
use crate::keys::statics::grant_value;
use crate::sys;

/// What else a decision depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// The call of a domain that was interrupted: the signal's frame lies on the stack of a thread whose call is running
    /// in a domain.
    pub(super) call: Option<CallFacts>,
    /// The key of the statics, if they have one of their own.
    pub(super) statics_key: Option<ProtectionKey>,
    /// The key of the vaults, if one is open.
    pub(super) lent_key: Option<ProtectionKey>,
    /// The program leaves it to the kernel what the signal does. Looked at only for signals in `sys::LIMITS`.
    pub(super) is_default: bool,
}

/// Facts about an interrupted call.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallFacts {
    /// The gate is on its way out: the FS base is the caller's.
    pub(super) is_leaving: bool,
    /// This process is a copy that code in the domain has made. Looked at only for signals that are about the code.
    pub(super) is_copy: bool,
    /// The instruction is one by which std notes a panic in a static, and the handler can skip it.
    pub(super) is_panic_write: bool,
    /// The program may fill the page on demand: its handler is to be asked.
    pub(super) is_asked: bool,
}

/// What to do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Decision {
    /// End the call: its caller resumes.
    Rewind {
        /// The reason, if code of this crate in the domain ended the call.
        reason: Option<AbortReason>,
    },
    /// Resume after the instruction, as if it had written.
    SkipPanicWrite,
    /// Run the program's handler, or do what it wants instead.
    Forward,
    /// Run the program's handler, and resume as if it had filled a page.
    Ask,
    /// Give rights to a key of the program's, and resume.
    Grant {
        key: ProtectionKey,
        to: Grantee,
        /// A thread waits to hear of it.
        acknowledge: bool,
    },
    /// Resume what was interrupted.
    Resume,
    /// Have a copy from or to a domain's memory fail: resume at this instruction.
    FailCopy { resume: u64 },
    /// Exit: a copy of the process must not continue as the program.
    Exit { status: i32 },
    /// Leave the fault to the kernel: it happens again and ends the process.
    Default,
}

/// Who gets rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grantee {
    /// The interrupted code, which is the program's.
    Interrupted,
    /// The caller of the interrupted call, once the call ends.
    Caller,
    /// Nobody. The gate compares the caller's rights at this moment; the caller gets them when it faults.
    Nobody,
}

/// Decides what to do about a signal.
pub(super) fn decide(at: &Interrupted, facts: &Facts) -> Decision {
    let is_grant = sys::is_fault(at.signal) && at.code == libc::SI_QUEUE && at.value == grant_value();
    if let Some(key) = facts.statics_key.filter(|_| is_grant) {
        let to = match facts.call {
            None => Grantee::Interrupted,
            Some(call) if call.is_leaving => Grantee::Nobody,
            Some(_) => Grantee::Caller,
        };
        return Decision::Grant { key, to, acknowledge: true };
    }
    match facts.call {
        Some(call) => in_call(at, call, facts.is_default),
        None => outside(at, facts),
    }
}

fn in_call(at: &Interrupted, call: CallFacts, is_default: bool) -> Decision {
    if !ends_call(at, is_default) {
        return Decision::Forward;
    }
    let is_abort = at.signal == libc::SIGILL && at.instruction == AbortReason::instruction();
    let reason = is_abort.then(|| AbortReason::decode(at.arguments)).flatten();
    if call.is_copy {
        let status = if let Some(AbortReason::Exit { status }) = reason { status } else { libc::EXIT_FAILURE };
        return Decision::Exit { status };
    }
    if call.is_panic_write {
        return Decision::SkipPanicWrite;
    }
    if call.is_asked {
        return Decision::Ask;
    }
    Decision::Rewind { reason }
}

/// Returns whether a signal that struck in a domain is about the code there: a fault, one that it has sent itself, its
/// deadline, or a limit of the process that would end it.
fn ends_call(at: &Interrupted, is_default: bool) -> bool {
    if sys::is_limit(at.signal) {
        // Of the kernel's own signals some have the code and the sender of kill(2).
        return is_default && (at.code > 0 || at.is_own);
    }
    if !sys::is_fault(at.signal) {
        return false;
    }
    match at.code {
        libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL => at.is_own,
        libc::SI_TIMER => is_deadline(at),
        _ => true,
    }
}

fn is_deadline(at: &Interrupted) -> bool {
    at.signal == DEADLINE && at.code == libc::SI_TIMER && at.value == deadline_value()
}

fn outside(at: &Interrupted, facts: &Facts) -> Decision {
    if is_deadline(at) {
        // Of a call that has just ended, or has not begun.
        return Decision::Resume;
    }
    let programs = at.rights.get(ProtectionKey::DEFAULT).allow(Access::Write);
    // The grant signal has missed this thread, or another thread has opened a vault and lent what is in it.
    let is_programs = |key: &ProtectionKey| Some(*key) == facts.statics_key || Some(*key) == facts.lent_key;
    if let Some(key) = at.key.filter(|key| programs && is_programs(key)) {
        return Decision::Grant { key, to: Grantee::Interrupted, acknowledge: false };
    }
    if let Some(resume) = failed_copy(at).filter(|_| programs) {
        return Decision::FailCopy { resume };
    }
    // With a domain's rights, but in no call of this thread, the program's handler could not run.
    if programs || !sys::is_fault(at.signal) { Decision::Forward } else { Decision::Default }
}

/// Returns where to resume, if this crate was copying from or to a domain's memory and that memory is not accessible.
fn failed_copy(at: &Interrupted) -> Option<u64> {
    // The kernel's own codes are positive.
    let is_access = matches!(at.signal, libc::SIGSEGV | libc::SIGBUS) && at.code > 0;
    is_access.then(|| sys::resume_failed_copy(at.instruction, at.arguments, at.address)).flatten()
}

#[cfg(test)]
mod tests {
    use pkru::{AccessRights, KeyRights};

    use super::*;
    use crate::signal::trap::deadline_value;
    use crate::sys::FAULTS;

    /// Codes of signals that the kernel sends (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
    const SEGV_MAPERR: i32 = 1;
    const SEGV_PKUERR: i32 = 4;
    const SI_KERNEL: i32 = 0x80;
    const SI_TKILL: i32 = libc::SI_TKILL;

    /// What a table expects.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Expected {
        Rewind,
        RewindFor(AbortReason),
        Skip,
        Forward,
        Grant(Grantee, bool),
        Resume,
        FailCopy,
        Exit(i32),
        Ask,
        Default,
    }
    use Expected::*;

    fn of(decision: Decision) -> Expected {
        match decision {
            Decision::Rewind { reason: None } => Rewind,
            Decision::Rewind { reason: Some(reason) } => RewindFor(reason),
            Decision::SkipPanicWrite => Skip,
            Decision::Forward => Forward,
            Decision::Grant { key, to, acknowledge } => {
                assert_eq!(key, STATICS);
                Grant(to, acknowledge)
            }
            Decision::Resume => Resume,
            Decision::FailCopy { .. } => FailCopy,
            Decision::Exit { status } => Exit(status),
            Decision::Ask => Ask,
            Decision::Default => Default,
        }
    }

    const STATICS: ProtectionKey = ProtectionKey::new(7).expect("7 is a key");
    const OWN: ProtectionKey = ProtectionKey::new(3).expect("3 is a key");

    /// The rights of a domain, and those of the program.
    const DOMAINS: KeyRights = KeyRights::NONE.with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY);
    const PROGRAMS: KeyRights = KeyRights::LINUX_INITIAL;

    const SIGNAL: Interrupted = Interrupted {
        signal: libc::SIGSEGV,
        code: SEGV_MAPERR,
        is_own: false,
        value: 0,
        address: 0x1000,
        key: None,
        error_code: 6,
        instruction: 0x40_0000,
        stack: 0x7000_0000,
        arguments: [0; 3],
        rights: DOMAINS,
    };

    /// The facts where no domain runs and no key is the program's.
    const NOTHING: Facts = Facts { call: None, statics_key: None, lent_key: None, is_default: false };

    const CALL: CallFacts = CallFacts { is_leaving: false, is_copy: false, is_panic_write: false, is_asked: false };

    /// Checks a signal in a call, and the same signal outside any, with the rights of a domain and of the program.
    #[track_caller]
    fn check(at: Interrupted, in_call: Expected, with_domains_rights: Expected, with_programs_rights: Expected) {
        let facts = |call| Facts { call, ..NOTHING };
        assert_eq!(of(decide(&at, &facts(Some(CALL)))), in_call, "in a call: {at:?}");
        let at = Interrupted { rights: DOMAINS, ..at };
        assert_eq!(of(decide(&at, &facts(None))), with_domains_rights, "outside, with a domain's rights: {at:?}");
        let at = Interrupted { rights: PROGRAMS, ..at };
        assert_eq!(of(decide(&at, &facts(None))), with_programs_rights, "outside, with the program's rights: {at:?}");
    }

    #[test]
    fn faults_end_the_call_or_are_the_programs() {
        for (signal, code) in [
            (libc::SIGSEGV, SEGV_MAPERR),
            (libc::SIGSEGV, SEGV_PKUERR),
            (libc::SIGSEGV, SI_KERNEL),
            (libc::SIGBUS, 2),
            (libc::SIGILL, 2),
            (libc::SIGFPE, 1),
            (libc::SIGTRAP, SI_KERNEL),
            (libc::SIGTRAP, 1),
        ] {
            let key = (code == SEGV_PKUERR).then_some(OWN);
            check(Interrupted { signal, code, key, ..SIGNAL }, Rewind, Default, Forward);
        }
    }

    #[test]
    fn signals_that_processes_send() {
        for code in [libc::SI_USER, libc::SI_QUEUE, SI_TKILL] {
            for signal in FAULTS {
                // abort(3) and raise(3) in the domain, and kill(2) by another process.
                check(Interrupted { signal, code, is_own: true, ..SIGNAL }, Rewind, Default, Forward);
                check(Interrupted { signal, code, is_own: false, ..SIGNAL }, Forward, Default, Forward);
            }
            for signal in [libc::SIGALRM, libc::SIGUSR1, libc::SIGCHLD, libc::SIGTERM, 34, 64] {
                for is_own in [true, false] {
                    check(Interrupted { signal, code, is_own, ..SIGNAL }, Forward, Forward, Forward);
                }
            }
        }
    }

    #[test]
    fn timers() {
        let deadline = Interrupted { signal: DEADLINE, code: libc::SI_TIMER, value: deadline_value(), ..SIGNAL };
        check(deadline, Rewind, Resume, Resume);
        // The program's own timers, also with the same signal.
        check(Interrupted { value: 0, ..deadline }, Forward, Default, Forward);
        check(Interrupted { signal: libc::SIGALRM, ..deadline }, Forward, Forward, Forward);
        check(Interrupted { signal: libc::SIGSEGV, ..deadline }, Forward, Default, Forward);
        // The value alone says nothing.
        check(Interrupted { code: libc::SI_QUEUE, is_own: true, ..deadline }, Rewind, Default, Forward);
    }

    #[test]
    fn reasons_are_read_at_one_instruction_only() {
        let at = AbortReason::instruction();
        let invalid = Interrupted { signal: libc::SIGILL, code: 2, instruction: at, arguments: [3, 0, 0], ..SIGNAL };
        check(invalid, RewindFor(AbortReason::Abort), Default, Forward);
        check(
            Interrupted { arguments: [5, 9, 0], ..invalid },
            RewindFor(AbortReason::Exit { status: 9 }),
            Default,
            Forward,
        );
        // A domain that jumps there with other values, or raises the exception elsewhere, only ends its call.
        check(Interrupted { arguments: [99, 0, 0], ..invalid }, Rewind, Default, Forward);
        check(Interrupted { instruction: at + 1, ..invalid }, Rewind, Default, Forward);
        check(Interrupted { signal: libc::SIGSEGV, ..invalid }, Rewind, Default, Forward);
    }

    #[test]
    fn a_copy_from_memory_that_is_not_accessible_fails() {
        let (address, end) = (0x1000, 0x1008);
        let [instruction, ..] = sys::reading_instructions();
        let read = Interrupted { instruction, arguments: [0x7000, address, end], address: address + 1, ..SIGNAL };
        for (signal, code) in [(libc::SIGSEGV, SEGV_MAPERR), (libc::SIGSEGV, SEGV_PKUERR), (libc::SIGBUS, 2)] {
            // A domain that jumps to the instruction only ends its call.
            check(Interrupted { signal, code, ..read }, Rewind, Default, FailCopy);
        }
        // At another address or instruction, or from another source, it is the program's.
        for at in [
            Interrupted { address: end, ..read },
            Interrupted { address: 0x7000, ..read },
            Interrupted { instruction: read.instruction + 1, ..read },
            Interrupted { signal: libc::SIGILL, code: 2, ..read },
        ] {
            check(at, Rewind, Default, Forward);
        }
        check(Interrupted { code: libc::SI_USER, ..read }, Forward, Default, Forward);
    }

    #[test]
    fn the_program_is_asked_about_pages_that_it_may_fill() {
        let call = CallFacts { is_asked: true, ..CALL };
        let facts = |call| Facts { call: Some(call), ..NOTHING };
        assert_eq!(of(decide(&SIGNAL, &facts(call))), Ask);
        assert_eq!(of(decide(&SIGNAL, &facts(CallFacts { is_copy: true, ..call }))), Exit(libc::EXIT_FAILURE));
        assert_eq!(of(decide(&SIGNAL, &NOTHING)), Default, "in no call");
    }

    #[test]
    fn limits_end_the_call_if_they_would_end_the_program() {
        let facts = |is_default| Facts { call: Some(CALL), is_default, ..NOTHING };
        for at in [
            Interrupted { signal: libc::SIGPIPE, code: libc::SI_USER, is_own: true, ..SIGNAL },
            Interrupted { signal: libc::SIGXFSZ, code: libc::SI_USER, is_own: true, ..SIGNAL },
            Interrupted { signal: libc::SIGXCPU, code: SI_KERNEL, ..SIGNAL },
        ] {
            assert_eq!(of(decide(&at, &facts(true))), Rewind, "{at:?}");
            assert_eq!(of(decide(&at, &facts(false))), Forward, "the program has a handler: {at:?}");
            let outside = Facts { is_default: true, ..NOTHING };
            assert_eq!(of(decide(&at, &outside)), Forward, "outside: {at:?}");
            let others = Interrupted { code: libc::SI_USER, is_own: false, ..at };
            assert_eq!(of(decide(&others, &facts(true))), Forward, "another process sent it: {others:?}");
        }
    }

    #[test]
    fn a_copy_of_the_process_exits() {
        let call = Some(CallFacts { is_copy: true, is_panic_write: true, ..CALL });
        let facts = Facts { call, ..NOTHING };
        assert_eq!(of(decide(&SIGNAL, &facts)), Exit(libc::EXIT_FAILURE));
        let instruction = AbortReason::instruction();
        let exit = Interrupted { signal: libc::SIGILL, code: 2, instruction, arguments: [5, 42, 0], ..SIGNAL };
        assert_eq!(of(decide(&exit, &facts)), Exit(42));
        let other = Interrupted { signal: libc::SIGUSR1, code: libc::SI_USER, ..SIGNAL };
        assert_eq!(of(decide(&other, &facts)), Forward);
    }

    #[test]
    fn a_write_about_a_panic_is_skipped_in_a_call() {
        let facts = Facts { call: Some(CallFacts { is_panic_write: true, ..CALL }), ..NOTHING };
        assert_eq!(of(decide(&SIGNAL, &facts)), Skip);
    }

    #[test]
    fn the_grant_signal_gives_rights_to_whom_it_can() {
        let grant =
            Interrupted { signal: libc::SIGFPE, code: libc::SI_QUEUE, is_own: true, value: grant_value(), ..SIGNAL };
        let leaving = CallFacts { is_leaving: true, ..CALL };
        for rights in [DOMAINS, PROGRAMS] {
            let grant = Interrupted { rights, ..grant };
            for (call, to) in
                [(None, Grantee::Interrupted), (Some(CALL), Grantee::Caller), (Some(leaving), Grantee::Nobody)]
            {
                assert_eq!(of(decide(&grant, &Facts { call, statics_key: Some(STATICS), ..NOTHING })), Grant(to, true));
            }
        }
        // Without a key there is nothing to give; with another value, code or signal it is a signal like any other.
        for (at, statics_key) in [
            (grant, None),
            (Interrupted { value: 1, ..grant }, Some(STATICS)),
            (Interrupted { code: libc::SI_USER, ..grant }, Some(STATICS)),
        ] {
            assert_eq!(of(decide(&at, &Facts { call: Some(CALL), statics_key, ..NOTHING })), Rewind, "{at:?}");
        }
    }

    #[test]
    fn a_thread_of_the_program_gets_rights_to_its_keys_when_it_faults() {
        let fault = Interrupted { code: SEGV_PKUERR, key: Some(STATICS), rights: PROGRAMS, ..SIGNAL };
        for facts in [Facts { statics_key: Some(STATICS), ..NOTHING }, Facts { lent_key: Some(STATICS), ..NOTHING }] {
            assert_eq!(of(decide(&fault, &facts)), Grant(Grantee::Interrupted, false));
            assert_eq!(of(decide(&fault, &Facts { call: Some(CALL), ..facts })), Rewind, "in a domain");
            assert_eq!(of(decide(&Interrupted { rights: DOMAINS, ..fault }, &facts)), Default, "with its rights");
            assert_eq!(of(decide(&Interrupted { key: Some(OWN), ..fault }, &facts)), Forward);
        }
        assert_eq!(of(decide(&fault, &NOTHING)), Forward);
    }
}
