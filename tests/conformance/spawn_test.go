package conformance

import (
	"os/exec"
	"runtime"
	"sync"
)

// spawner is one thread that starts every daemon. The parent-death signal is
// tied to the thread that forked, not to the process, and Go ends threads as it
// likes; this one stays.
var spawner = sync.OnceValue(func() chan func() {
	jobs := make(chan func())
	go func() {
		runtime.LockOSThread()
		for job := range jobs {
			job()
		}
	}()
	return jobs
})

func startLocked(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	spawner() <- func() { result <- cmd.Start() }
	return <-result
}
