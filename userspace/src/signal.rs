//! Faults in a domain: the signal handler that ends the call, and what it leaves alone.
//!
//! A handler starts with the kernel's initial rights, which allow key 0 alone, and with the FS base of whatever was
//! interrupted. So the entry is a few instructions that touch no memory and open the rights; the rest is Rust that uses no
//! thread-local. For a fault in a domain it writes the rewind's state into the signal frame, and sigreturn resumes there with
//! the caller's rights in one step. Any other fault goes to the handler that was there before.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/signal.c`, `arch/x86/kernel/fpu/signal.c`, `arch/x86/include/uapi/asm/sigcontext.h`;
//! Intel SDM volume 1, section "XSAVE Area".

use std::arch::naked_asm;
use std::cell::{Cell, UnsafeCell};
use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru::gate::{Context, Gate};
use pkru::{KeyRights, ProtectionKey};

use crate::report::Report;
use crate::sys::{self, SignalAction};
use crate::{Error, process};

/// A call that runs in a domain, as the handler sees it. Domains can read it and not write it.
#[repr(C)]
pub(crate) struct Running {
    /// First, so that the gate's pointer to it leads to the whole.
    pub(crate) context: Context,
    /// The alternate stack of the thread that runs the call.
    pub(crate) signal_stack: Range<usize>,
    /// The domain's own stack.
    pub(crate) stack: Range<usize>,
    /// Written by the handler, when it ends the call.
    pub(crate) trap: Cell<Option<Trap>>,
}

impl Running {
    /// Whether the kernel can have put a signal's frame there, and no other domain.
    ///
    /// It takes the thread's alternate stack, which is ours unless the program has set another since, or has none any more, as
    /// std leaves it at the end of a thread; then it takes the stack in use.
    fn can_have_frame_at(&self, address: usize) -> bool {
        self.signal_stack.contains(&address)
            || self.stack.contains(&address)
            || sys::alternate_stack().is_some_and(|stack| stack.contains(&address))
    }
}

/// What the handler notes of a fault.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trap {
    pub(crate) signal: c_int,
    /// The kernel's reason, `si_code`.
    pub(crate) code: c_int,
    /// The address of the fault, where the signal has one.
    pub(crate) address: u64,
    pub(crate) instruction: u64,
    /// The stack pointer.
    pub(crate) stack: u64,
    /// The page fault's error code, where it was one.
    pub(crate) error_code: u32,
    /// The page's key, where a key denied the access.
    pub(crate) key: Option<ProtectionKey>,
    /// The rights in force.
    pub(crate) rights: KeyRights,
    pub(crate) report: Option<Report>,
}

/// The signals that a fault raises, and the one by which code aborts.
pub(crate) const SIGNALS: [c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT];

/// Where PKRU stands in the XSAVE area of a signal frame.
static PKRU_OFFSET: AtomicUsize = AtomicUsize::new(0);

/// The actions that were there before, in the order of [`SIGNALS`].
struct Previous([UnsafeCell<SignalAction>; SIGNALS.len()]);

// SAFETY: an element is written before the handler that reads it can be called for that signal, see `install`.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous([const { UnsafeCell::new(SignalAction::Default) }; SIGNALS.len()]);

/// Installs the handler. Called once.
pub(crate) fn install(pkru_offset: usize) -> Result<(), Error> {
    PKRU_OFFSET.store(pkru_offset, Ordering::Relaxed);
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS.0) {
        // A fault on another thread between these two calls meets the default action, as one before them could have.
        // SAFETY: the entry can be called at any instruction.
        let action = unsafe { sys::replace_action(signal, entry) }.map_err(Error::system("install a fault handler"))?;
        // SAFETY: nothing else writes it.
        unsafe { *previous.get() = action };
    }
    Ok(())
}

/// Opens the rights, with registers alone, and goes on in Rust. The arguments are in RDI, RSI and RDX.
#[unsafe(naked)]
unsafe extern "C" fn entry(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    naked_asm!(
        "mov r8, rdx",
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // A domain may have jumped to the write.
        "test eax, eax",
        "jne 2f",
        // Linux leaves AC as it was, and a misaligned access here would be the end.
        "pushfq",
        "and dword ptr [rsp], ~0x40000",
        "popfq",
        "mov rdx, r8",
        "jmp {handle}",
        "2: ud2",
        handle = sym handle,
    )
}

unsafe extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    // SAFETY: the kernel passes a valid frame, and nobody else uses it while the handler runs.
    let context = unsafe { &mut *frame.cast::<libc::ucontext_t>() };
    // SAFETY: as above.
    if let Some(state) = unsafe { SavedPkru::of(context) } {
        let rights = state.read();
        if let Some(running) = Gate::PKRU.running(rights) {
            let running = running.cast::<Running>();
            // SAFETY: every context that is entered by this crate is the head of a `Running`, alive while its call runs.
            let call = unsafe { running.as_ref() };
            if call.can_have_frame_at(frame as usize) {
                // Code in the domain has duplicated the process: the copy must not go on as the program.
                if !process::is_original() {
                    sys::exit_now();
                }
                // SAFETY: the kernel passes a valid description of the signal.
                call.trap.set(Some(unsafe { trap(signal, info, context, rights) }));
                // SAFETY: the fault struck on this thread with this context's rights, and sigreturn resumes as it says.
                unsafe { rewind(running.cast(), context, &state) };
                return;
            }
        }
    }
    // SAFETY: these are the kernel's own arguments.
    unsafe { pass_on(signal, info, frame) };
}

/// Writes the state in which the caller resumes into the signal frame.
///
/// # Safety
///
/// As for [`Gate::rewind`].
unsafe fn rewind(running: NonNull<Context>, context: &mut libc::ucontext_t, state: &SavedPkru) {
    /// TF, DF, NT and AC.
    const FLAGS: i64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;
    /// The word holds CS, GS, FS and SS, from the lowest bits up. A far jump in the domain can have changed the first and the last.
    const CS_AND_SS: u64 = 0xffff_0000_0000_ffff;
    /// `__USER_CS` and `__USER_DS` (Linux 6.12, `arch/x86/include/asm/segment.h`).
    const USER_CS_AND_SS: u64 = 0x002b_0000_0000_0033;
    // SAFETY: the caller answers for it.
    let rewind = unsafe { Gate::PKRU.rewind(running) };
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RIP as usize] = rewind.instruction as i64;
    registers[libc::REG_RSP as usize] = rewind.stack as i64;
    registers[libc::REG_RDI as usize] = rewind.rdi as i64;
    registers[libc::REG_EFL as usize] &= !FLAGS;
    let segments = &mut registers[libc::REG_CSGSFS as usize];
    *segments = (*segments as u64 & !CS_AND_SS | USER_CS_AND_SS) as i64;
    state.write(rewind.rights);
}

/// Notes what the fault was.
///
/// # Safety
///
/// The pointers are those that the kernel passed.
unsafe fn trap(signal: c_int, info: *const libc::siginfo_t, context: &libc::ucontext_t, rights: KeyRights) -> Trap {
    /// The offset of `si_pkey` in `siginfo_t`, and the code that says that it is there
    /// (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
    const SI_PKEY: usize = 0x20;
    const SEGV_PKUERR: c_int = 4;

    let register = |index: c_int| context.uc_mcontext.gregs[index as usize] as u64;
    // SAFETY: the caller answers for the pointer.
    let description = unsafe { &*info };
    let code = description.si_code;
    // SAFETY: a signal of these that the CPU raised has an address; in others the field is some other number.
    let address = unsafe { description.si_addr() } as u64;
    let key = (signal == libc::SIGSEGV && code == SEGV_PKUERR).then(|| {
        // SAFETY: with this code the field is there.
        unsafe { info.wrapping_byte_add(SI_PKEY).cast::<u32>().read() }
    });
    let instruction = register(libc::REG_RIP);
    let report = if signal == libc::SIGILL {
        Report::decode(instruction, register(libc::REG_RDI), register(libc::REG_RSI))
    } else {
        None
    };
    Trap {
        signal,
        code,
        address,
        instruction,
        stack: register(libc::REG_RSP),
        error_code: register(libc::REG_ERR) as u32,
        key: key.and_then(|key| ProtectionKey::new(key as u8)),
        rights,
        report,
    }
}

/// Does what would have been done without this crate.
///
/// # Safety
///
/// The arguments are those that the kernel passed.
unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    let index = SIGNALS.iter().position(|known| *known == signal);
    let Some(previous) = index.and_then(|index| PREVIOUS.0.get(index)) else { return };
    // SAFETY: it was written before this handler could be called.
    let previous = unsafe { previous.get().read() };
    match previous {
        // SAFETY: the handler gets what the kernel passed.
        SignalAction::Full(handler) => unsafe { handler(signal, info, frame) },
        // SAFETY: as above.
        SignalAction::Simple(handler) => unsafe { handler(signal) },
        SignalAction::Default | SignalAction::Ignore => {
            // SAFETY: the kernel passes a valid description of the signal.
            let sent = unsafe { (*info).si_code } <= 0;
            if sent && matches!(previous, SignalAction::Ignore) {
                return;
            }
            // On return the instruction faults again, or the signal sent again is delivered, and the kernel acts on it. After a
            // breakpoint the next instruction would run.
            sys::default_action(signal);
            if sent || signal == libc::SIGTRAP {
                sys::resend(signal);
            }
        }
    }
}

/// PKRU as a signal frame holds it.
struct SavedPkru {
    value: *mut u32,
    /// XSTATE_BV, whose bits say which components are not in their initial state.
    present: *mut u64,
}

impl SavedPkru {
    const COMPONENT: u64 = 1 << 9;

    /// Finds it in a frame; `None` if the frame has no such component.
    ///
    /// # Safety
    ///
    /// The frame is the kernel's.
    unsafe fn of(context: &libc::ucontext_t) -> Option<Self> {
        const MAGIC1: u32 = 0x4650_5853;
        const MAGIC2: u32 = 0x4650_5845;
        /// The software-reserved bytes of the FXSAVE area, `struct _fpx_sw_bytes`.
        #[derive(Clone, Copy)]
        #[repr(C)]
        struct SoftwareBytes {
            magic1: u32,
            extended_size: u32,
            features: u64,
            state_size: u32,
        }
        const SOFTWARE_BYTES: usize = 464;
        const HEADER: usize = 512;
        const { assert!(offset_of!(SoftwareBytes, features) == 8) };

        let area = context.uc_mcontext.fpregs.cast::<u8>();
        if area.is_null() {
            return None;
        }
        // SAFETY: the FXSAVE area is longer than these bytes' offset and size.
        let software = unsafe { area.wrapping_add(SOFTWARE_BYTES).cast::<SoftwareBytes>().read() };
        let offset = PKRU_OFFSET.load(Ordering::Relaxed);
        let size = software.state_size as usize;
        if software.magic1 != MAGIC1 || software.features & Self::COMPONENT == 0 || offset + 4 > size {
            return None;
        }
        // SAFETY: with the first magic number the area has this size, and the second one follows it.
        if unsafe { area.wrapping_add(size).cast::<u32>().read_unaligned() } != MAGIC2 {
            return None;
        }
        let present = area.wrapping_add(HEADER).cast();
        let value = area.wrapping_add(offset).cast();
        Some(Self { value, present })
    }

    fn read(&self) -> KeyRights {
        // SAFETY: the pointer leads into the frame.
        if unsafe { self.present.read() } & Self::COMPONENT == 0 {
            // The component is in its initial state.
            return KeyRights::ALL;
        }
        // SAFETY: as above.
        KeyRights::from_bits(unsafe { self.value.read() })
    }

    fn write(&self, rights: KeyRights) {
        // SAFETY: the pointer leads into the frame.
        unsafe { self.value.write(rights.bits()) };
        // SAFETY: as above.
        unsafe { *self.present |= Self::COMPONENT };
    }
}
