// Notices of the pack's nodes, in every view of the editor: app mode shows no texts on nodes.
import { app } from '../../scripts/app.js'

const LIFE = 20000
const shown = new Set() // a node that samples many times warns many times

app.registerExtension({
  name: 'MoMA.Notices',
  setup() {
    app.api.addEventListener('moma.notice', ({ detail }) => {
      if (shown.has(detail.text)) return
      shown.add(detail.text)
      setTimeout(() => shown.delete(detail.text), LIFE)
      app.extensionManager.toast.add({ severity: 'warn', summary: 'MoMA', detail: detail.text, life: LIFE })
    })
  }
})
